"""A run is a folder, readable without us, and the only memory of a run.

config.toml, prompts.txt       everything needed to repeat it, with grid-prompts.txt
metrics.jsonl                  one line an epoch, appended and flushed
samples/epoch-0010.png         a fixed prompt and seed grid
lora/epoch-0010.safetensors    and lora/latest.safetensors
checkpoints/epoch-0010/        exact state
plots/*.png
"""

import json
import os
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w
from filelock import FileLock, Timeout

from comfy_tdpo.prompts import load_prompts

from .config import TrainConfig, plain_values, validate

EpochMetrics = dict[str, float]

CONFIG, PROMPTS, GRID_PROMPTS, METRICS = "config.toml", "prompts.txt", "grid-prompts.txt", "metrics.jsonl"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, flush it to the disk, and put it in place; never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        write(beside)
        flush_to_disk(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path):
        self.path = path

    def check_free(self) -> None:
        """Raise ValueError where a new run cannot be made here."""
        if (self.path / CONFIG).exists():
            raise ValueError(f"run directory {str(self.path)!r} holds a run; --resume continues it, or choose another")
        if self.path.exists() and (not self.path.is_dir() or any(map(_is_foreign, self.path.iterdir()))):
            raise ValueError(f"got run directory {str(self.path)!r}; expected a new or an empty folder")

    def create(self, config: TrainConfig) -> "RunFolder":
        """Make it a new run of `config`, which can be continued from any folder and whatever becomes of the prompts.

        The configuration goes last: where it is, there is a run.
        """
        self.check_free()
        for name, source in ((PROMPTS, config.prompts), (GRID_PROMPTS, config.grid_prompts or config.prompts)):
            self._write_text(name, "".join(f"{prompt}\n" for prompt in load_prompts(source)))
        self._write_text(CONFIG, tomli_w.dumps(plain_values(_with_absolute_model(config))))
        return self

    def _write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda file: file.write_text(text, encoding="utf-8"))

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run at `path`, for reading or resuming."""
        if not (path / CONFIG).is_file():
            raise ValueError(f"got run directory {str(path)!r}; expected a folder with a {CONFIG}, as a run makes it")
        return cls(path)

    @property
    def config(self) -> TrainConfig:
        try:
            return validate(tomllib.loads((self.path / CONFIG).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{self.path / CONFIG} cannot be read: {error}") from error

    def prompts(self, config: TrainConfig) -> list[str]:
        """The training prompts, as the run began with them; before there is a run, those that `config` names."""
        return self._kept_prompts(PROMPTS) or load_prompts(config.prompts)

    def grid_prompts(self, config: TrainConfig) -> list[str]:
        """The same for those of the sample grids."""
        return self._kept_prompts(GRID_PROMPTS) or load_prompts(config.grid_prompts or config.prompts)

    def _kept_prompts(self, name: str) -> list[str]:
        return load_prompts(str(self.path / name)) if (self.path / CONFIG).is_file() else []

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run, so that no other process writes to it; let go when this process ends, however it ends."""
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"run directory {str(self.path)!r} is in use by another process; stop that first"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def metrics(self) -> list[EpochMetrics]:
        """The epochs so far; a last line that was cut off in mid-write does not count."""
        path = self.path / METRICS
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        try:
            return [json.loads(line) for line in complete.splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged: {error}; restore it, or start a new run") from error

    def append_metrics(self, metrics: EpochMetrics) -> None:
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget_after(self, epoch: int) -> None:
        """Drop the metrics of epochs after `epoch`: they were not finished, and are run again."""
        if not (self.path / METRICS).exists():
            return
        self._write_text(METRICS, "".join(json.dumps(line) + "\n" for line in self.metrics() if line["epoch"] <= epoch))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def latest_lora(self) -> Path:
        return self.path / "lora" / "latest.safetensors"

    def lora(self, epoch: int) -> Path:
        return self.path / "lora" / f"{epoch_name(epoch)}.safetensors"

    def sample_grid(self, epoch: int) -> Path:
        return self.path / "samples" / f"{epoch_name(epoch)}.png"

    def plot(self, name: str) -> Path:
        return self.path / "plots" / f"{name}.png"


def _is_foreign(path: Path) -> bool:
    """Whether it is something else than what a process killed while it made the run has left."""
    return path.name not in (PROMPTS, GRID_PROMPTS) and ".partial" not in path.name


def _with_absolute_model(config: TrainConfig) -> TrainConfig:
    """A model's file or folder as it is called from everywhere; a name stays."""
    if config.model == "shapes" or not Path(config.model).expanduser().exists():
        return config
    return config.model_copy(update={"model": str(Path(config.model).expanduser().resolve())})


def epoch_name(epoch: int) -> str:
    return f"epoch-{epoch:04d}"
