"""What the terminal shows while a run trains: a progress bar, or one line per epoch."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Self, TextIO

from tqdm import tqdm

from comfy_tdpo.counts import number_of

from ..config import TrainConfig
from ..metrics import duration, readable, reward_names
from ..run import EpochMetrics
from .streams import SafeStream, encodable

PACE = 5  # latest epochs whose mean duration gives the ETA
RATIO_TOLERANCE = 1e-5  # the largest |ratio - 1| expected before the first update of an epoch
NARROW = 50  # columns; on narrower terminals, a bar would leave no room for text
LOGGER = logging.getLogger("comfy_tdpo")  # the library's, the trainer's and the nodes'


class Console:
    """One progress bar for the whole run on a terminal; one plain line per epoch elsewhere, or if TERM is dumb.

    Inside `with`, it also prints the warnings that the program logs, each on a line of its own beside the bar, and it
    is closed at the end. A stream that fails, or cannot encode a character, does not end the training.

    Args:
        config: the run's configuration; first_epoch: the first epoch to run, above 1 in a resumed run.
        stream: where to write, by default stderr.
    """

    def __init__(self, config: TrainConfig, first_epoch: int, stream: TextIO | None = None):
        self.config, self.stream = config, SafeStream(stream or sys.stderr)
        self._paces: deque[float] = deque(maxlen=PACE)
        self._end: float | None = None  # when the run is expected to end, on the monotonic clock
        self._results, self._held_out, self._warned = "", "", False
        has_bar = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = self._make_bar(first_epoch - 1) if has_bar else None

    def __enter__(self) -> Self:
        self._handler = _Telling(self._print)
        LOGGER.addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        LOGGER.removeHandler(self._handler)
        self.close()

    def _make_bar(self, done: int) -> tqdm:
        columns, bar_format = self._layout()
        return tqdm(
            total=self.config.epochs,
            initial=done,
            file=self.stream,
            miniters=0,  # redraw by time only, at most ten times a second
            ncols=columns,
            bar_format=bar_format,
        )

    def _layout(self) -> tuple[int | None, str]:
        """A line's width, for the terminal's current size, and its format; tqdm cuts off what does not fit."""
        columns = self.stream.columns()
        narrow = columns is not None and columns < NARROW
        bar_format = "{n_fmt}/{total_fmt} {desc}" if narrow else "epochs {n_fmt}/{total_fmt} |{bar:8}| {desc}"
        return columns, bar_format

    def begin(self, device: object, arithmetic: str = "") -> None:
        """Report that the run has loaded and starts; `arithmetic` describes the device's, if there is a choice."""
        config, how = self.config, f" ({arithmetic})" if arithmetic else ""
        self._print(
            f"training {config.model} with {config.algorithm} on {device}{how}, "
            f"{number_of(config.samples_per_epoch, 'sample')} per epoch"
        )

    def watch(self, phase: str, done: float, total: int) -> None:
        """Show progress within the current epoch; cheap enough to call for every forward pass."""
        if self._bar is not None:
            self._describe(f"{phase} {int(done)}/{total}")
            self._bar.update(0)

    def epoch(self, metrics: EpochMetrics) -> None:
        """Report a finished epoch."""
        self._paces.append(metrics["time/epoch_s"])
        self._end = time.monotonic() + (self.config.epochs - metrics["epoch"]) * fmean(self._paces)
        if self._bar is None:
            self._print(_epoch_line(metrics, self.config.epochs, self._eta()))
        else:
            self._results, self._held_out = "  ".join(_results(metrics, "EV")), "  ".join(_held_out(metrics))
            self._bar.n = metrics["epoch"]
            self._describe("epoch done")
            self._bar.refresh()
        if "policy/ratio_drift" in metrics:
            self._check_drift(metrics["policy/ratio_drift"])

    def close(self) -> None:
        """Leave the bar as it is and move the cursor to a new line."""
        if self._bar is not None:
            self._bar.close()

    def _describe(self, phase: str) -> None:
        assert self._bar is not None
        parts = (phase.ljust(15), self._results, self._eta(), self._held_out)
        text = encodable("  ".join(part for part in parts if part), self.stream.encoding)
        self._bar.set_description_str(text, refresh=False)
        self._bar.ncols, self._bar.bar_format = self._layout()

    def _eta(self) -> str:
        return f"ETA {duration(max(0.0, self._end - time.monotonic()))}" if self._end is not None else ""

    def _check_drift(self, drift: float) -> None:
        if drift <= RATIO_TOLERANCE or self._warned:
            return
        self._warned = True
        config = self.config
        self._print(
            f"warning: ratio drift {_tiny(drift)}, expected at most {_tiny(RATIO_TOLERANCE)}: sampling and training "
            "compute different probabilities with the same model, so updates are clipped that should not be. Set "
            f"precision to fp32 (now {config.precision}), or try another micro_batch (now "
            f"{config.micro_batch or 'as many as fit'}){', or set compile to false' if config.compile else ''}."
        )

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self.stream, flush=True)
        else:
            self._bar.write(line, file=self.stream)


class _Telling(logging.Handler):
    """Tells warnings, and what is worse, in one line each."""

    def __init__(self, tell: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")


def _epoch_line(metrics: EpochMetrics, epochs: int, eta: str) -> str:
    reward, *critic = _results(metrics, "critic EV")
    drift = [f"ratio drift {_tiny(metrics['policy/ratio_drift'])}"] if "policy/ratio_drift" in metrics else []
    seconds = f"{metrics['time/epoch_s']:.1f} s"
    return "  ".join(
        [f"epoch {metrics['epoch']:.0f}/{epochs}", reward, *_held_out(metrics), *drift, *critic, seconds, eta]
    )


def _results(metrics: EpochMetrics, critic: str) -> list[str]:
    """The training reward, and the critic's explained variance if there is a critic."""
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
