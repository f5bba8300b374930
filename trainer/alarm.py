"""What users are told about overoptimisation, from a run's metrics and files; overoptimisation.py holds the rule."""

from dataclasses import dataclass
from pathlib import Path

from comfy_tdpo.tastes.names import is_taste

from .config import TrainConfig
from .metrics import reward_names
from .run import EpochMetrics, RunFolder

SINCE = "overoptimisation/since"  # the metric that the epochs have from the alarm on


@dataclass(frozen=True)
class Alarm:
    """The epoch after which the rule was met, the first epoch whose images are worse, and what was seen.

    fall: in standard deviations of the first epoch's scores; errors: the fall in standard errors.
    """

    epoch: int
    since: int
    fall: float
    errors: float


def alarm_of(metrics: list[EpochMetrics]) -> Alarm | None:
    """The alarm of a run with these metrics; None if it has not overoptimised."""
    line = next((line for line in metrics if SINCE in line), None)
    if line is None:
        return None
    fall, errors = line["overoptimisation/fall"], line["overoptimisation/standard_errors"]
    return Alarm(int(line["epoch"]), int(line[SINCE]), fall, errors)


def ends_early(metrics: list[EpochMetrics], config: TrainConfig) -> bool:
    """Whether a run with these metrics ends before its last epoch, because `config` says so."""
    return config.stop_on_overoptimisation and alarm_of(metrics) is not None


def lora_before(run: RunFolder, since: int) -> Path | None:
    """The last snapshot kept from before the held-out reward fell; None if there is none, as for the base model.

    The images of an epoch are drawn before its updates, so those of epoch `since` - 1, the last good ones, were drawn
    with the LoRA of epoch `since` - 2. With policy.ema, the file holds the average up to that epoch, which lags behind
    the weights that drew.
    """
    return next((run.lora(e) for e in range(since - 2, 0, -1) if run.lora(e).is_file()), None)


def unguarded(config: TrainConfig) -> str:
    """What a training on a taste lacks, and what to do; empty if it lacks nothing, or trains on no taste."""
    tastes = [name for name in config.trained_on if is_taste(name)]
    guarded = bool(config.guards) and getattr(config, "guard_penalty", 0) > 0
    lacking = (
        [] if guarded else ["it has no guard: choose algorithm ddpo-g and set guards to a reward that reads prompts"]
    )
    if config.overoptimisation.reward is None:
        lacking.append("no held-out reward is watched: set overoptimisation.reward to one")
    if not tastes or not lacking:
        return ""
    return f"{tastes[0]} is learned from few votes and soon overoptimised, but {', and '.join(lacking)}"


def told(run: RunFolder, metrics: list[EpochMetrics], config: TrainConfig) -> str:
    """What was seen and what to do, in a few sentences; empty if the run has not overoptimised."""
    alarm = alarm_of(metrics)
    if alarm is None:
        return ""
    (training,) = reward_names(metrics, "reward")
    lora = lora_before(run, alarm.since)
    use = f"Use {'/'.join(lora.parts[-2:])}, the last snapshot from before that, or" if lora else "Use"
    size = f"{alarm.fall:.2f} standard deviations of epoch 1 ({alarm.errors:.1f} standard errors"
    return (
        f"Overoptimisation since epoch {alarm.since}: {training} rose while the held-out "
        f"{config.overoptimisation.reward} fell by {size}, seen after epoch {alarm.epoch}). {use} a later snapshot "
        "at a lower strength; `recommend` finds the best."
    )
