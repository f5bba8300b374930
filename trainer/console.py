"""What a person at the terminal sees: a bar or lines while a run trains, and a summary at its end."""

import math
import sys
import textwrap
import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TextIO

from tqdm import tqdm

from .config import TrainConfig
from .plots import readable, reward_names, shortened
from .run import EpochMetrics, RunFolder
from .training import RATIO_TOLERANCE

COLUMNS = 100  # of the summary
LAST = 3  # epochs whose mean is compared with the first
PACE = 5  # latest epochs whose mean duration makes the ETA


# --- while it runs --------------------------------------------------------------------------------------------------


class Console:
    """One progress bar for the whole run on a terminal, one plain line an epoch anywhere else.

    Args:
        config: the run's configuration; first_epoch: the one that runs first, above 1 in a resumed run.
        stream: where to write; none: stderr.
    """

    def __init__(self, config: TrainConfig, first_epoch: int, stream: TextIO | None = None):
        self.config, self.stream = config, stream or sys.stderr
        self._paces: deque[float] = deque(maxlen=PACE)
        self._end: float | None = None  # when the run will be done, on the monotonic clock
        self._results, self._held_out, self._warned = "", "", False
        self._bar = self._make_bar(first_epoch - 1) if self.stream.isatty() else None

    def _make_bar(self, done: int) -> tqdm:
        return tqdm(
            total=self.config.epochs,
            initial=done,
            file=self.stream,
            dynamic_ncols=True,
            miniters=0,  # tqdm then redraws by the clock alone, at most ten times a second
            bar_format="epochs {n_fmt}/{total_fmt} |{bar:8}| {desc}",
        )

    def begin(self, device: object) -> None:
        """It is loaded, and begins."""
        config = self.config
        self._print(
            f"training {config.model} by {config.algorithm} on {device}, {config.samples_per_epoch} samples an epoch"
        )

    def watch(self, phase: str, done: int, total: int) -> None:
        """See the current epoch move; cheap enough for every micro-batch."""
        if self._bar is not None:
            self._bar.set_description_str(self._describe(f"{phase} {done}/{total}"), refresh=False)
            self._bar.update(0)

    def epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is done."""
        self._paces.append(metrics["time/epoch_s"])
        self._end = time.monotonic() + (self.config.epochs - metrics["epoch"]) * fmean(self._paces)
        if self._bar is None:
            self._print(_epoch_line(metrics, self.config.epochs, self._eta()))
        else:
            self._results, self._held_out = "  ".join(_results(metrics, "EV")), "  ".join(_held_out(metrics))
            self._bar.n = metrics["epoch"]
            self._bar.set_description_str(self._describe("epoch done"))
        self._check_drift(metrics["policy/ratio_drift"])

    def close(self) -> None:
        """Leave the bar as it stands and the cursor on a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def _describe(self, phase: str) -> str:
        return "  ".join(part for part in (phase.ljust(15), self._results, self._eta(), self._held_out) if part)

    def _eta(self) -> str:
        return f"ETA {duration(max(0.0, self._end - time.monotonic()))}" if self._end is not None else ""

    def _check_drift(self, drift: float) -> None:
        if drift <= RATIO_TOLERANCE or self._warned:
            return
        self._warned = True
        config = self.config
        self._print(
            f"warning: ratio drift {_tiny(drift)}, expected at most {_tiny(RATIO_TOLERANCE)}: sampling and training "
            "disagree about one and the same model, so updates are clipped that should not be. Set precision to fp32 "
            f"(it is {config.precision}), or another micro_batch (it is {config.micro_batch or 'what fits'})."
        )

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self.stream, flush=True)
        else:
            self._bar.write(line, file=self.stream)


def _epoch_line(metrics: EpochMetrics, epochs: int, eta: str) -> str:
    reward, *critic = _results(metrics, "critic EV")
    drift, seconds = f"ratio drift {_tiny(metrics['policy/ratio_drift'])}", f"{metrics['time/epoch_s']:.1f} s"
    return "  ".join(
        [f"epoch {metrics['epoch']:.0f}/{epochs}", reward, *_held_out(metrics), drift, *critic, seconds, eta]
    )


def _results(metrics: EpochMetrics, critic: str) -> list[str]:
    """The training reward, and the critic's explained variance where there is one."""
    (name,) = reward_names([metrics], "reward")
    mean, std = metrics[f"reward/{name}/mean"], metrics[f"reward/{name}/std"]
    results = [f"reward {readable(mean)} ± {readable(std, like=mean)}"]
    if "critic/explained_variance" in metrics:
        results.append(f"{critic} {metrics['critic/explained_variance']:z.2f}")
    return results


def _held_out(metrics: EpochMetrics) -> list[str]:
    return [f"{name} {readable(metrics[f'eval/{name}/mean'])}" for name in reward_names([metrics], "eval")]


def _tiny(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def duration(seconds: float) -> str:
    """Minutes and seconds, as in 2:04, with hours before them where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --- at its end -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """The means of a reward over the epochs, and its standard deviation in the first, NaN where it is not known.

    The last epochs are the last three, or as many as there are after the first. After a single epoch there are none,
    and what they would tell is NaN.
    """

    name: str
    means: list[float]
    std: float

    @property
    def last(self) -> float:
        return fmean(self._latest) if self._latest else math.nan

    @property
    def change(self) -> float:
        return self.last - self.means[0]

    @property
    def change_in_std(self) -> float:
        return self.change / self.std if self.std > 0 else math.nan

    @property
    def direction(self) -> int:
        """1 where the reward rose, -1 where it fell, 0 where it changed by less than twice the standard error.

        The variance of an epoch's mean is read off neighbouring epochs, E[d^2] / 2, which a trend hardly enters; the
        change has that of the first epoch and that of the mean of the last ones.
        """
        if not self._latest:
            return 0
        noise = self._noise(len(self._latest))
        return 0 if abs(self.change) <= noise else int(math.copysign(1, self.change))

    def had_fallen(self, epoch: int) -> bool:
        """Whether it was lower in `epoch` than in the first by more than noise."""
        return self.means[epoch - 1] < self.means[0] - self._noise(1)

    def _noise(self, epochs: int) -> float:
        """Twice the standard error of the change from the first epoch to the mean of `epochs`."""
        variance = fmean((after - before) ** 2 for before, after in pairwise(self.means)) / 2
        rounding = 1e-9 * abs(self.means[0])  # where nothing changed
        return max(2 * math.sqrt(variance * (1 + 1 / epochs)), rounding)

    @property
    def _latest(self) -> list[float]:
        return self.means[1:][-LAST:]


def summary(run: RunFolder) -> str:
    """What came of the run: a table, a verdict, and where things lie; at most 100 columns but for paths."""
    metrics = run.metrics()
    if not metrics:
        return f"No epoch has finished yet in {run.path}."
    (training,), held_out = _courses(metrics, "reward"), _courses(metrics, "eval")
    verdict = textwrap.fill(_verdict(training, held_out, run), COLUMNS)
    return "\n\n".join([_table(training, held_out), verdict, _facts(run, metrics)])


def _courses(metrics: list[EpochMetrics], kind: str) -> list[Course]:
    return [
        Course(
            name,
            [epoch[f"{kind}/{name}/mean"] for epoch in metrics],
            metrics[0].get(f"{kind}/{name}/std", math.nan),
        )
        for name in reward_names(metrics, kind)
    ]


def _table(training: Course, held_out: list[Course]) -> str:
    rows: list[tuple[str, ...]] = [
        ("reward", "epoch 1", _last_epochs(len(training.means)), "change", "in std of epoch 1")
    ]
    rows += [_row(training, "trained on"), *(_row(course, "held out") for course in held_out)]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {a:>9}  {b:>15}  {c:>9}  {d:>17}" for name, a, b, c, d in rows)


def _last_epochs(epochs: int) -> str:
    first = max(2, epochs - LAST + 1)
    if epochs <= 2:
        return "epoch 2" if epochs == 2 else "later"
    return f"mean of {first}-{epochs}"


def _row(course: Course, role: str) -> tuple[str, ...]:
    first, change = course.means[0], course.change
    cells = [
        (first, readable(first)),
        (course.last, readable(course.last, like=first)),
        (change, readable(change, like=first, sign="+")),
        (course.change_in_std, f"{course.change_in_std:+z.2f}"),
    ]
    return f"{shortened(course.name, 28)} ({role})", *(text if math.isfinite(value) else "-" for value, text in cells)


def _verdict(training: Course, held_out: list[Course], run: RunFolder) -> str:
    if len(training.means) == 1:
        return "One epoch has finished: there is no change to tell yet."
    fallen = [course for course in held_out if course.direction < 0]
    fell = [course.name for course in fallen]
    if training.direction > 0 and fallen:
        return (
            f"Overoptimisation: {training.name} rose while the held-out {_listed(fell)} fell: later images suit the "
            f"training reward at the cost of the others. Use an earlier LoRA of this run{_earlier(run, fallen)}, train "
            "for fewer epochs, or add a KL penalty (--kl.coefficient)."
        )
    return f"{_training_sentence(training)} {_held_out_sentence(held_out, fell)}"


def _earlier(run: RunFolder, fallen: list[Course]) -> str:
    """The last LoRA that was kept before one of `fallen` fell."""
    epochs = range(1, len(fallen[0].means))
    kept = [e for e in epochs if run.lora(e).exists() and not any(course.had_fallen(e) for course in fallen)]
    return f", such as {'/'.join(run.lora(kept[-1]).parts[-2:])}" if kept else ""


def _training_sentence(training: Course) -> str:
    if training.direction == 0:
        return f"{training.name} did not change by more than the noise between epochs."
    size = readable(abs(training.change), like=training.means[0])
    return f"{training.name} {'rose' if training.direction > 0 else 'fell'} by {size} in {len(training.means)} epochs."


def _held_out_sentence(held_out: list[Course], fell: list[str]) -> str:
    if not held_out:
        return "No held-out reward watched; --eval-reward adds one, and shows overoptimisation."
    if fell:
        return f"The held-out {_listed(fell)} fell."
    rose = [course.name for course in held_out if course.direction > 0]
    return f"The held-out {_listed(rose)} rose, and none fell." if rose else "No held-out reward rose or fell."


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _facts(run: RunFolder, metrics: list[EpochMetrics]) -> str:
    lora, plots = run.latest_lora.resolve(), run.plot("reward").parent.resolve()
    rows = [
        ("reward queries", f"{metrics[-1]['reward_queries']:,.0f}"),
        ("total time", duration(sum(epoch["time/epoch_s"] for epoch in metrics))),
        ("peak memory", f"{max(epoch['memory/peak_bytes'] for epoch in metrics) / 2**30:.1f} GiB"),
        ("LoRA", str(lora)),
        ("  in ComfyUI", "copy it to models/loras and choose it in a Load LoRA node"),
        ("  in diffusers", f"pipe.load_lora_weights({str(lora)!r})"),
        ("plots", str(plots)),
    ]
    return "\n".join(f"{label:<14}  {value}" for label, value in rows)
