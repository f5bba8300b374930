"""A run is a folder of plain files, and everything about the run is stored there. See paths.py for its files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import tomli_w
from filelock import FileLock, Timeout

from comfy_tdpo import __version__
from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.shapes import MODELS
from comfy_tdpo.user_files import read_text, user_path

from ..config import Fields, TrainConfig, plain_values, validate
from ..config.changes import unknown
from ..config.toml_files import read_toml
from .json_lines import append_lines
from .new_folder import check_free
from .paths import CONFIG, GRID_PROMPTS, LOCK, METRICS, MODEL, PROMPTS, RunPaths, run_nearby

EpochMetrics = dict[str, float]

WRITTEN_BY = "# comfy_tdpo "  # followed by the version, the first line of a run's configuration


class TrainingError(RuntimeError):
    """A training cannot continue; everything saved so far is intact."""


class RunFolder(RunPaths):
    """The folder of one run."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._lock = FileLock(path / LOCK, timeout=0)

    def check_free(self) -> None:
        """Raise ValueError if a new run cannot be created here."""
        check_free(self.path)

    def create(self, config: TrainConfig) -> "RunFolder":
        """Create a new run of `config`, which can be resumed from any folder, even if the prompt files change.

        The configuration is written last: a folder is a run once it has one.
        """
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock():
            self.check_free()  # another process may have been faster
            self.configure(config)
        return self

    def configure(self, config: TrainConfig) -> None:
        """Write `config` and its prompts for a run that has not trained yet; the caller holds the lock."""
        prompts = self._load_prompts(config.prompts)
        self._write_lines(PROMPTS, prompts)
        shown = self._load_prompts(config.grid_prompts) if config.grid_prompts else prompts
        self._write_lines(GRID_PROMPTS, spread(shown, config.output.grid_images))
        self.make_snapshots_folder(config)
        self.write_config(_with_absolute_model(config))

    def make_snapshots_folder(self, config: TrainConfig) -> None:
        """Make, for a run of `config`, what tells whether its snapshots are LoRAs: see `trains_all`."""
        if config.policy.trains_all:
            (self.path / MODEL).mkdir(exist_ok=True)
        elif self.trains_all:
            (self.path / MODEL).rmdir()  # the run has not trained yet, and was to train all weights before

    def _load_prompts(self, source: str) -> list[str]:
        """The prompts of a set or a user's file; if the run's own file is named, its lines as they are."""
        path = self.path / PROMPTS
        return _read_lines(path) if source == str(path) else load_prompts(source)

    def write_config(self, config: TrainConfig) -> None:
        """Replace the run's configuration; changes that are not allowed are rejected when the run resumes."""
        self._write_text(CONFIG, f"{WRITTEN_BY}{__version__}\n" + tomli_w.dumps(plain_values(config)))

    def keep_changes(self, config: TrainConfig) -> None:
        """Save `config`, which may differ from the run's own in settings that may change."""
        if config != self.config:
            self.write_config(_with_absolute_model(config))

    def _write_lines(self, name: str, lines: list[str]) -> None:
        self._write_text(name, "".join(f"{line}\n" for line in lines))

    def _write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda file: file.write_text(text, encoding="utf-8"))

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open the run at `path`, for reading or resuming."""
        try:
            found = (path / CONFIG).is_file()
            meant = None if found else run_nearby(path)
        except OSError as error:  # no permission, or too long a name
            raise ValueError(f"run directory {str(path)!r} cannot be read: {error.strerror}; check the path") from error
        if not found:
            hint = f"; did you mean {str(meant)!r}?" if meant else ""
            raise ValueError(
                f"got run directory {str(path)!r}; expected the folder of a run, which has a {CONFIG}{hint}"
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
        """A message about settings that this version does not know; empty if it wrote the configuration itself."""
        first = read_text(self.path / CONFIG).partition("\n")[0]
        version = first.removeprefix(WRITTEN_BY) if first.startswith(WRITTEN_BY) else ""
        names = unknown(values)
        if not names or version == __version__:
            return ""
        return (
            f"got the setting {names[0]!r}, which comfy_tdpo {__version__} does not know; the run was started by a "
            f"newer version{', ' + version if version else ''}: resume it with that, or correct the name"
        )

    def prompts(self, config: TrainConfig) -> list[str]:
        """The training prompts that the run started with; before it exists, those that `config` names."""
        return self._kept_prompts(PROMPTS) or load_prompts(config.prompts)

    def grid_prompts(self, config: TrainConfig) -> list[str]:
        """The same for the prompts of the sample grids, one per image, row by row."""
        shown = self._kept_prompts(GRID_PROMPTS) or load_prompts(config.grid_prompts or config.prompts)
        return spread(shown, config.output.grid_images)

    def _kept_prompts(self, name: str) -> list[str]:
        if not (self.path / CONFIG).is_file():
            return []
        if not (self.path / name).is_file():
            raise ValueError(f"{self.path / name} is missing, and the run cannot resume without it; restore it")
        return _read_lines(self.path / name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run, so that no other process writes to it; the lock ends with this process, however it ends."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"run directory {str(self.path)!r} is in use by another process; stop that first"
            ) from error
        except NotImplementedError as error:  # such as some network mounts
            raise ValueError(
                f"run directory {str(self.path)!r} is on a file system without file locks; choose one on another disk"
            ) from error
        try:
            yield
        finally:
            self._lock.release()

    def metrics(self) -> list[EpochMetrics]:
        """The metrics of the epochs so far; a last line that was cut off mid-write is ignored."""
        path = self.path / METRICS
        if not path.exists():
            return []
        try:
            text = path.read_text(encoding="utf-8")
            return [_parse_metrics(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        except (ValueError, RecursionError, OSError) as error:  # not UTF-8, JSON, metrics or a file
            raise ValueError(
                f"{path} is damaged: {error}; delete it: --resume restores it from the checkpoint"
            ) from error

    def append_metrics(self, metrics: EpochMetrics) -> None:
        append_lines(self.path / METRICS, [metrics])

    def write_metrics(self, metrics: list[EpochMetrics]) -> None:
        """Replace the file's content with `metrics`."""
        self._write_lines(METRICS, [json.dumps(line) for line in metrics])


def spread(prompts: list[str], count: int) -> list[str]:
    """`count` of `prompts`, spread evenly over all of them."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _read_lines(path: Path) -> list[str]:
    """The prompts in a run's own file, one per line, taken literally, unlike those in a user's file."""
    return [line for line in map(str.strip, read_text(path).split("\n")) if line]


def _parse_metrics(line: str) -> EpochMetrics:
    metrics = json.loads(line)
    if not isinstance(metrics, dict) or not isinstance(metrics.get("epoch"), int):
        raise ValueError(f"got the line {shorten(line, 60)!r}; expected an epoch's metrics")
    if not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError(f"got the line {shorten(line, 60)!r}; expected only numbers")
    return metrics


def _with_absolute_model(config: TrainConfig) -> TrainConfig:
    """`config` with the absolute path of the model's file or folder; a model's name stays as it is."""
    model = user_path(config.model)
    if config.model in MODELS or not model.exists():
        return config
    return config.model_copy(update={"model": str(model.resolve())})
