"""A run is a folder, readable without us, and the only memory of a run. What lies in it: see run_paths.py."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import tomli_w
from filelock import FileLock, Timeout

from comfy_tdpo import __version__
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.user_files import read_text, user_path

from ..config import Fields, TrainConfig, plain_values, validate
from ..config.changes import unknown
from ..config.toml_files import read_toml
from .files import naming, write_atomically
from .new_folder import check_free
from .paths import CONFIG, GRID_PROMPTS, LOCK, METRICS, PROMPTS, RunPaths, run_nearby

EpochMetrics = dict[str, float]

WRITTEN_BY = "# comfy_tdpo "  # and the version, in the first line of a run's configuration


class TrainingError(RuntimeError):
    """A training cannot go on; what it saved before is whole."""


class RunFolder(RunPaths):
    """The folder of one run."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._lock = FileLock(path / LOCK, timeout=0)

    def check_free(self) -> None:
        """Raise ValueError where a new run cannot be made here."""
        check_free(self.path)

    def create(self, config: TrainConfig) -> "RunFolder":
        """Make it a new run of `config`, which can be continued from any folder and whatever becomes of the prompts.

        The configuration goes last: where it is, there is a run.
        """
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock():
            self.check_free()  # another process may have been faster
            self.configure(config)
        return self

    def configure(self, config: TrainConfig) -> None:
        """Make `config` that of a run which has trained nothing yet; call it under the lock."""
        prompts = self._load_prompts(config.prompts)
        self._write_lines(PROMPTS, prompts)
        shown = self._load_prompts(config.grid_prompts) if config.grid_prompts else prompts
        self._write_lines(GRID_PROMPTS, spread(shown, config.output.grid_images))
        self.write_config(_with_absolute_model(config))

    def _load_prompts(self, source: str) -> list[str]:
        """Those of a set or a user's file; those that a host has put in place are taken as they are."""
        path = self.path / PROMPTS
        return _read_lines(path) if source == str(path) else load_prompts(source)

    def write_config(self, config: TrainConfig) -> None:
        """Replace the run's configuration; what is not free to change is refused when the run goes on."""
        self._write_text(CONFIG, f"{WRITTEN_BY}{__version__}\n" + tomli_w.dumps(plain_values(config)))

    def keep_changes(self, config: TrainConfig) -> None:
        """Keep `config`, which may differ from the run's own where a run may change on its way."""
        if config != self.config:
            self.write_config(_with_absolute_model(config))

    def _write_lines(self, name: str, lines: list[str]) -> None:
        self._write_text(name, "".join(f"{line}\n" for line in lines))

    def _write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda file: file.write_text(text, encoding="utf-8"))

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The run at `path`, for reading or resuming."""
        try:
            found = (path / CONFIG).is_file()
            meant = None if found else run_nearby(path)
        except OSError as error:  # nobody may look, or its name is too long
            raise ValueError(f"run directory {str(path)!r} cannot be read: {error.strerror}; check the path") from error
        if not found:
            hint = f"; did you mean {str(meant)!r}?" if meant else ""
            raise ValueError(
                f"got run directory {str(path)!r}; expected a folder with a {CONFIG}, as a run makes it{hint}"
            )
        return cls(path)

    @property
    def config(self) -> TrainConfig:
        values = read_toml(self.path / CONFIG)
        try:
            return validate(values)
        except ValueError as error:
            raise ValueError(
                f"configuration '{self.path / CONFIG}': {self._of_newer_version(values) or error}"
            ) from error

    def _of_newer_version(self, values: Fields) -> str:
        """What to say of settings that another version has written; empty where it was this one."""
        first = read_text(self.path / CONFIG).partition("\n")[0]
        version = first.removeprefix(WRITTEN_BY) if first.startswith(WRITTEN_BY) else ""
        names = unknown(values)
        if not names or version == __version__:
            return ""
        return (
            f"got the setting {names[0]!r}, which comfy_tdpo {__version__} does not know; the run was begun by a newer "
            f"version{', ' + version if version else ''}: continue it with that, or mend the name"
        )

    def prompts(self, config: TrainConfig) -> list[str]:
        """The training prompts, as the run began with them; before there is a run, those that `config` names."""
        return self._kept_prompts(PROMPTS) or load_prompts(config.prompts)

    def grid_prompts(self, config: TrainConfig) -> list[str]:
        """The same for those of the sample grids, one an image, row by row."""
        shown = self._kept_prompts(GRID_PROMPTS) or load_prompts(config.grid_prompts or config.prompts)
        return spread(shown, config.output.grid_images)

    def _kept_prompts(self, name: str) -> list[str]:
        if not (self.path / CONFIG).is_file():
            return []
        if not (self.path / name).is_file():
            raise ValueError(f"{self.path / name} is gone, without which the run cannot go on; put it back")
        return _read_lines(self.path / name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run, so that nobody else writes to it; let go when this process ends, however it ends."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"run directory {str(self.path)!r} is in use by another process; stop that first"
            ) from error
        except NotImplementedError as error:  # as some network mounts
            raise ValueError(
                f"run directory {str(self.path)!r} is on a file system without locks; choose one on another disk"
            ) from error
        try:
            yield
        finally:
            self._lock.release()

    def metrics(self) -> list[EpochMetrics]:
        """The epochs so far; a last line that was cut off in mid-write does not count."""
        path = self.path / METRICS
        if not path.exists():
            return []
        try:
            text = path.read_text(encoding="utf-8")
            return [_parse_metrics(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        except (ValueError, RecursionError, OSError) as error:  # of UTF-8, of JSON, ours, or it is no file
            raise ValueError(
                f"{path} is damaged: {error}; delete it: --resume writes it anew from the checkpoint"
            ) from error

    def append_metrics(self, metrics: EpochMetrics) -> None:
        path = self.path / METRICS
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_metrics(self, metrics: list[EpochMetrics]) -> None:
        """Have `metrics`, and those alone, in the file."""
        self._write_lines(METRICS, [json.dumps(line) for line in metrics])


def spread(prompts: list[str], count: int) -> list[str]:
    """`count` of `prompts`, evenly over all of them."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _read_lines(path: Path) -> list[str]:
    """The prompts that a run keeps, one a line, without what a user's file may hold besides."""
    return [line for line in map(str.strip, read_text(path).split("\n")) if line]


def _parse_metrics(line: str) -> EpochMetrics:
    metrics = json.loads(line)
    if not isinstance(metrics, dict) or not isinstance(metrics.get("epoch"), int):
        raise ValueError(f"got the line {shorten(line, 60)!r}; expected an epoch's metrics")
    if not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError(f"got the line {shorten(line, 60)!r}; expected numbers alone")
    return metrics


def _with_absolute_model(config: TrainConfig) -> TrainConfig:
    """A model's file or folder as it is called from everywhere; a name stays."""
    model = user_path(config.model)
    if config.model == "shapes" or not model.exists():
        return config
    return config.model_copy(update={"model": str(model.resolve())})
