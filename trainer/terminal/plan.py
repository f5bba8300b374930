"""Shows the steps of a run and what it takes: `python -m comfy_tdpo.trainer plan [--SETTING VALUE ...]`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from comfy_tdpo.counts import number_of
from comfy_tdpo.methods.sections import SteppedPolicySettings
from comfy_tdpo.methods.window import window
from comfy_tdpo.models import Outline, outline
from comfy_tdpo.models.sizes import is_countable
from comfy_tdpo.process import Process, make_process
from comfy_tdpo.resolution import latent_sides

from ..assemble import model_source
from ..config import TrainConfig
from ..run.disk import bytes_of_run
from . import seconds

SENSITIVE = 5.0  # most steps have 0.05 to 1.5


def plan(config: TrainConfig) -> Iterator[str]:
    """The denoising steps of a run of `config`, from the model's configuration alone, then what the run takes, which
    may need minutes to count.

    Raises:
        ValueError: the model's configuration cannot be read, or the run could not start.
    """
    model = outline(model_source(config), config.prediction_type)
    name, drawn = config.process or model.process, config.drawn_with
    size = latent_sides(config.resolution, model.factor, model.patch)
    size_of_evaluation = latent_sides(drawn["resolution"], model.factor, model.patch, "eval_resolution")
    process, _ = (
        make_process(name, model.scheduler, steps, torch.device("cpu"), sides)
        for steps, sides in ((config.steps, size), (drawn["steps"], size_of_evaluation))
    )
    policy = config.policy
    trained = window(policy, process.stochastic) if isinstance(policy, SteppedPolicySettings) else None
    head = f"{config.model} by {config.algorithm}: {number_of(config.steps, 'step')} of {name}, "
    head += f"guidance {config.guidance:g}"
    if config.embedded_guidance is not None:
        head += f", embedded guidance {config.embedded_guidance:g}"
    lines = [head, "", *_table(process, trained), *_remarks(process, trained, config.algorithm)]
    yield "\n".join(lines)
    yield "\n".join(["", *_costs(config, process, model)])


def _costs(config: TrainConfig, process: Process, model: Outline) -> list[str]:
    """What a run takes: reward queries and passes of the network, seconds where a run has measured them or the model's
    sizes are known from its configurations, and with these, memory and disk."""
    samples, drawn = config.epochs * config.samples_per_epoch, config.drawn_with
    halves, grids = 1 if config.guidance == 1 else 2, 1 + -(-config.epochs // config.output.samples_every)
    halves_of_grid = 1 if drawn["guidance"] == 1 else 2
    lines = [
        f"{samples * config.queries_per_sample} reward queries in {number_of(config.epochs, 'epoch')}",
        f"{samples * len(process) * halves} latents go through the network to draw the samples"
        + (", two for each step, because of guidance" if halves == 2 else ""),
        f"{grids * config.output.grid_images * drawn['steps'] * halves_of_grid} more draw {grids} sample grids "
        f"({config.drawn_with_told})",
    ]
    from .fits import decoder_of, fits, footprint  # imports diffusers' networks

    measured = seconds.measured(config)
    if model.configs is None or not is_countable(model.configs):
        decoder_of(config)  # which may be missing
        counted = "time and memory" if measured is None else "memory"
        own = [] if measured is None else [measured]
        return [*lines, *own, f"{counted}: not counted, since the sizes of this model's networks are not known"]
    found = footprint(config, model.configs, model.absent)
    disk = max(bytes_of_run(config, found.checkpoint, found.snapshot) / 1e9, 0.1)
    lines.append(measured or seconds.estimated(config, process, found.flops))
    lines.append(f"disk: up to {disk:.1f} GB, for snapshots and checkpoints")
    whole = (
        ["memory is that of a process that holds the whole model, without policy.shard"] if config.policy.shard else []
    )
    return [*lines, *fits(found, config), *whole]


def _table(process: Process, trained: Tensor | None) -> list[str]:
    lines = ["step    time   sigma  sensitivity" + ("" if trained is None else "  trained")]
    columns = zip(process.times.tolist(), process.sigma.tolist(), process.sensitivity.tolist(), strict=True)
    for k, (time, sigma, sensitivity) in enumerate(columns):
        shown = "-" if sigma == 0 else f"{sensitivity:.2f}"
        mark = "" if trained is None else f"  {'yes' if trained[k] else 'no':>7}"
        lines.append(f"{k + 1:>4}  {time:>6.1f}  {sigma:>6.4f}  {shown:>11}{mark}")
    return lines


def _remarks(process: Process, trained: Tensor | None, algorithm: str) -> list[str]:
    lines = ["", "sensitivity: how far a step moves with the model's output, in units of its noise sigma"]
    if trained is None:
        return [*lines, f"{algorithm} back-propagates the reward and needs no noise."]
    if drowning := [k + 1 for k in trained.nonzero().flatten().tolist() if process.sensitivity[k] > SENSITIVE]:
        numbers = ", ".join(map(str, drowning))
        lines.append(
            f"Above {SENSITIVE:g} (step {numbers}), a step drowns the others where an update sums over steps: leave it "
            "out by --policy.train-until, or choose another --process."
        )
    return lines
