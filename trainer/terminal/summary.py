"""The summary of a run as text: a table of its rewards, a verdict on overoptimisation, and where its files are."""

import math
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from comfy_tdpo.counts import number_of

from ..alarm import told
from ..metrics import columns_of, duration, padded, readable, reward_names, role, shortened
from ..run import EpochMetrics, RunFolder
from ..run.loras import network_of

COLUMNS = 100
LAST = 3  # epochs whose mean is compared with the first epoch


@dataclass(frozen=True)
class Course:
    """A reward's mean in each epoch, and its standard deviation in the first, NaN if unknown.

    The last epochs are the last three, or fewer if fewer follow the first. After a single epoch there are none, and
    `last` and the changes are NaN.
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
        """1 if the reward rose, -1 if it fell, 0 if it changed by less than twice the standard error.

        The variance of an epoch's mean is estimated from consecutive epochs, E[d^2] / 2, which a trend barely affects.
        The variance of the change is that of the first epoch plus that of the mean of the last ones.
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
        rounding = 1e-9 * abs(self.means[0])  # if nothing changed
        return max(2 * math.sqrt(variance * (1 + 1 / epochs)), rounding)

    @property
    def _latest(self) -> list[float]:
        return self.means[1:][-LAST:]


def summary(run: RunFolder) -> str:
    """The summary of a run: a table, a verdict and its files; at most 100 columns wide except for paths."""
    metrics = run.metrics()
    if not metrics:
        return f"No epoch has finished yet in {run.path}."
    (training,) = _courses(metrics, "reward")
    tracked = _courses(metrics, "guard") + _courses(metrics, "eval")
    roles = {course.name: role(course.name, run.config) for course in tracked}
    held_out = [course for course in tracked if roles[course.name] == "held out"]
    verdict = textwrap.fill(_verdict(training, held_out, run), COLUMNS, break_on_hyphens=False)
    return "\n\n".join([_table(training, tracked, roles), verdict, _facts(run, metrics)])


def _courses(metrics: list[EpochMetrics], kind: str) -> list[Course]:
    return [
        Course(
            name,
            [epoch[f"{kind}/{name}/mean"] for epoch in metrics],
            metrics[0].get(f"{kind}/{name}/std", math.nan),
        )
        for name in reward_names(metrics, kind)
    ]


def _table(training: Course, tracked: list[Course], roles: dict[str, str]) -> str:
    rows: list[tuple[str, ...]] = [
        ("reward", "epoch 1", _last_epochs(len(training.means)), "change", "in std of epoch 1")
    ]
    rows += [_row(training, "trained on"), *(_row(course, roles[course.name]) for course in tracked)]
    width = max(columns_of(row[0]) for row in rows)
    return "\n".join(f"{padded(name, width)}  {a:>9}  {b:>15}  {c:>9}  {d:>17}" for name, a, b, c, d in rows)


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
        return "Only one epoch has finished, so there is no change to report yet."
    remedies = ["train for fewer epochs"]
    if hasattr(run.config, "kl"):  # some algorithms have no penalty
        remedies.append("add a KL penalty (--kl.coefficient)")
    if alarm := told(run, run.metrics(), run.config):
        return f"{alarm} Or {', or '.join(remedies)}."
    fallen = [course for course in held_out if course.direction < 0]
    fell = [course.name for course in fallen]
    if training.direction > 0 and fallen:
        return (
            f"{training.name} rose while the held-out {_listed(fell)} fell. Later images score well "
            "on the training reward at the expense of the others. Use an earlier snapshot of this run"
            f"{', '.join([_earlier(run, fallen), *remedies[:-1]])}, or {remedies[-1]}."
        )
    return f"{_training_sentence(training)} {_held_out_sentence(held_out, fell)}"


def _earlier(run: RunFolder, fallen: list[Course]) -> str:
    """The last snapshot saved before any of `fallen` fell, as an example; empty if there is none."""
    epochs = range(1, len(fallen[0].means))
    kept = [e for e in epochs if run.lora(e).exists() and not any(course.had_fallen(e) for course in fallen)]
    return f", such as {'/'.join(run.lora(kept[-1]).parts[-2:])}" if kept else ""


def _training_sentence(training: Course) -> str:
    if training.direction == 0:
        return f"{training.name} did not change by more than the noise between epochs."
    size = readable(abs(training.change), like=training.means[0])
    moved = "rose" if training.direction > 0 else "fell"
    return f"{training.name} {moved} by {size} in {number_of(len(training.means), 'epoch')}."


def _held_out_sentence(held_out: list[Course], fell: list[str]) -> str:
    if not held_out:
        return "No held-out reward was tracked; add one with --eval-reward to detect overoptimisation."
    if fell:
        return f"The held-out {_listed(fell)} fell."
    rose = [course.name for course in held_out if course.direction > 0]
    return f"The held-out {_listed(rose)} rose, and none fell." if rose else "No held-out reward rose or fell."


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _facts(run: RunFolder, metrics: list[EpochMetrics]) -> str:
    plots = run.plot("reward").parent.resolve()
    rows = [
        ("reward queries", f"{metrics[-1]['reward_queries']:,.0f}"),
        ("total time", duration(sum(epoch["time/epoch_s"] for epoch in metrics))),
        ("peak memory", f"{max(epoch['memory/peak_bytes'] for epoch in metrics) / 2**30:.1f} GiB"),
        *_uses(run),
        ("plots", str(plots)),
    ]
    return "\n".join(f"{label:<14}  {value}" for label, value in rows)


def _uses(run: RunFolder) -> list[tuple[str, str]]:
    """Where the trained weights are, and what to do with them."""
    path = run.latest_lora.resolve()
    if not run.trains_all:
        return [
            ("LoRA", str(path)),
            ("  in ComfyUI", "copy it to models/loras and choose it in a Load LoRA node"),
            ("  in diffusers", f"pipe.load_lora_weights({str(path)!r})"),
        ]
    return [
        ("model", str(path)),
        ("  in ComfyUI", "copy it to models/diffusion_models and choose it in a Load Diffusion Model node"),
        ("  in diffusers", f"pipe.{network_of(path)}.load_state_dict(safetensors.torch.load_file({str(path)!r}))"),
    ]
