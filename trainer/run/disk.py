"""Whether the disk has room for a run whose snapshots and checkpoints hold all weights of a model."""

import shutil

from comfy_tdpo.counts import number_of
from comfy_tdpo.optimizers import bytes_of_moments
from comfy_tdpo.policy import DiffusionPolicy

from ..config import TrainConfig
from ..overoptimisation import latest_epochs
from .paths import RunPaths

FLOAT32 = 4  # bytes


def check_disk(run: RunPaths, config: TrainConfig, policy: DiffusionPolicy) -> str:
    """What such a run will need, for the user; empty if it trains a LoRA, which needs next to nothing.

    Raises:
        ValueError: the disk has less room than that.
    """
    if not config.policy.trains_all:
        return ""
    checkpoint, snapshot = bytes_of_checkpoint(config, policy), bytes_of_snapshot(policy)
    kept, snapshots = config.output.keep_checkpoints, most_snapshots(config)
    needed = bytes_of_run(config, checkpoint, snapshot)
    left = max(needed - _used(run), 0)
    folder = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    parts = (
        f"{number_of(kept, 'checkpoint')} of {_size(checkpoint)}, one more while it is written, and up to "
        f"{number_of(snapshots, 'model')} of {_size(snapshot)}"
    )
    if free < left:
        raise ValueError(
            f"got a disk with {_size(free)} free for a run that trains all weights; expected room for "
            f"{_size(left)} more, for {parts}: free some, lower output.keep_checkpoints, raise "
            "output.samples_every, or choose another disk"
        )
    return f"all weights are trained: the run needs {_size(needed)} of disk, for {parts}; {_size(free)} are free"


def bytes_of_run(config: TrainConfig, checkpoint: int, snapshot: int) -> int:
    """The most bytes of a run whose checkpoints and snapshots have so many; one checkpoint more while it is written."""
    return (config.output.keep_checkpoints + 1) * checkpoint + most_snapshots(config) * snapshot


def bytes_of_checkpoint(config: TrainConfig, policy: DiffusionPolicy) -> int:
    """Its weights, their moments, their average, and a reference that was reset; all else is small."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters)
    moments = bytes_of_moments(policy.count, config.policy)
    average = policy.count * FLOAT32 if config.policy.ema else 0
    kl = getattr(config, "kl", None)
    reference = weights if kl and (kl.reset_above is not None or kl.reset_every is not None) else 0
    return weights + moments + average + reference


def bytes_of_snapshot(policy: DiffusionPolicy) -> int:
    base = policy.trainable.base.values()
    return sum(weight.numel() * weight.element_size() for weight in base) or policy.count * FLOAT32  # of a LoRA


def most_snapshots(config: TrainConfig) -> int:
    """Those of every few epochs and the last, the latest, the recommended, and those kept until it is known whether
    the run overoptimises."""
    regular = -(-config.epochs // config.output.samples_every)
    watched = latest_epochs(config.overoptimisation, config.epochs) + 2 if config.overoptimisation.reward else 0
    return min(regular + watched, config.epochs) + 1 + config.output.recommend


def _used(run: RunPaths) -> int:
    """What the run has written already, of what is counted."""
    found = [path for folder in (run.checkpoints, run.snapshots) for path in folder.rglob("*.safetensors")]
    return sum(path.stat().st_size for path in found)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
