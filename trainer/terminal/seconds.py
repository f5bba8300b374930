"""How long a run may take: as a run with the same settings took, or else as its arithmetic suggests.

Both are estimates. The arithmetic leaves out rewards, the critic with its encoder, and all that is no product of
matrices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from comfy_tdpo.counts import in_tenths, number_of
from comfy_tdpo.methods.sections import ClippedPolicySettings, SteppedPolicySettings
from comfy_tdpo.methods.window import steps_read, trained_steps
from comfy_tdpo.process import Process
from comfy_tdpo.resolution import sides

from ..assemble import DTYPES
from ..config import TrainConfig, plain_values
from ..config.changes import differences
from ..run import RunFolder
from ..run.new_folder import RUNS
from ..run.paths import CONFIG

if TYPE_CHECKING:
    from .fits import Flops  # imports diffusers' networks

# Settings that leave an epoch as long as it is, or sections of them.
AS_LONG = (
    *("seed", "epochs", "grid_prompts", "eval_steps", "eval_guidance", "eval_resolution"),
    *("stop_on_overoptimisation", "overoptimisation", "output", "reward_weights"),
)
# How fast networks are compared with a large product of matrices: SD 1.4's architecture in bf16 on an H100 made 0.2 of
# the card's rate, see benchmarks/sd14_gpu.md; large transformers come nearer to it.
LEAST, MOST = 0.2, 0.6
SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices that are multiplied
SECONDS = 0.2  # for which they are


def measured(config: TrainConfig) -> str | None:
    """What a run in the folder of runs took for an epoch with these settings; None if there is none."""
    for run in _runs():
        try:
            before = plain_values(run.config)
            found = differences(plain_values(config), before)
            times = [line["time/epoch_s"] for line in run.metrics()]
        except (ValueError, KeyError):  # of another version, or damaged: another run may tell
            continue
        if times and not [name for name in found if name.split(".")[0] not in AS_LONG]:
            epoch = statistics.median(times)
            return (
                f"time: run {str(run.path)!r} took {told(epoch)} an epoch with the same settings, which makes "
                f"{told(epoch * config.epochs)} for {number_of(config.epochs, 'epoch')} on the same machine; an "
                "estimate"
            )
    return None


def _runs() -> Iterator[RunFolder]:
    """Those in the usual folder, newest first."""
    found = RUNS.glob(f"*/{CONFIG}")
    yield from (RunFolder(path.parent) for path in sorted(found, key=lambda path: -path.stat().st_mtime))


def estimated(config: TrainConfig, process: Process, flops: Flops) -> str:
    """What the arithmetic of the networks takes on this machine."""
    drawn, trained = flops_of_sample(config, process, flops)
    total = (drawn + trained) * config.epochs * config.samples_per_epoch
    device, rate = rate_here(DTYPES[config.precision])
    least, most = (total / rate / share for share in (MOST, LEAST))
    left_out = "" if trained else ", without that of back-propagation"
    whole, to_draw, to_train = in_tenths(total / 1e15), in_tenths(drawn / 1e12), in_tenths(trained / 1e12)
    return (
        f"time: the networks' arithmetic is {whole} PFLOP{left_out}, {to_draw} TFLOP to draw a sample and {to_train} "
        f"to train on it; at {LEAST:g} to {MOST:g} of the {rate / 1e12:.2g} TFLOP/s that a product of matrices reaches "
        f"on {device} here, {told(least)} to {told(most)}; a rough estimate"
    )


def flops_of_sample(config: TrainConfig, process: Process, flops: Flops) -> tuple[float, float]:
    """Floating-point operations for each sample: to draw it with all that is decoded of it, and to train on it; the
    latter is 0 for methods that back-propagate rewards, whose graphs differ."""
    drawn = len(process) * flops.step + flops.image + _seen(config, process) * flops.seen
    policy = config.policy
    if not isinstance(policy, SteppedPolicySettings):
        return drawn, 0.0
    steps = int(trained_steps(policy, process.stochastic, config.seed, epoch=1).sum())
    replayed = 1 + policy.replay_share if isinstance(policy, ClippedPolicySettings) and policy.replay else 1
    return drawn, steps * replayed * flops.training


def _seen(config: TrainConfig, process: Process) -> float:
    """How many images a critic sees of each sample, in images of full size."""
    critic = getattr(config, "critic", None)
    if critic is None or not critic.sees_images:
        return 0
    from comfy_tdpo.reading import positions  # imports diffusers

    assert isinstance(config.policy, SteppedPolicySettings), "its algorithms train on steps"
    steps = steps_read(critic, config.policy, process.stochastic)
    pixels = sides(config.resolution)
    scale = 1.0 if critic.image_size is None else min(critic.image_size / pixels[0], 1.0) ** 2
    return len(positions(steps, critic.read_every)) * scale


def rate_here(dtype: torch.dtype) -> tuple[str, float]:
    """This machine's device, and the floating-point operations per second that it reaches in a product of matrices;
    on the CPU in float32, as many CPUs emulate half precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype if device == "cuda" else torch.float32
    side = SIDES[device]
    a = torch.randn(side, side, device=device).to(dtype)

    def multiply() -> float:
        (a @ a)[0, 0].item()  # waits for the device
        return time.perf_counter()

    start, count = multiply(), 0
    while (end := multiply()) - start < SECONDS or not count:
        count += 1
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    return name, 2 * side**3 * (count + 1) / (end - start)


def told(seconds: float) -> str:
    """Such as 40 s, 12 min, 3.5 h or 6 days."""
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
