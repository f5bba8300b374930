"""The files in the folder of a run.

config.toml, prompts.txt       everything needed to repeat it
grid-prompts.txt               the prompts of a sample grid's images, row by row
metrics.jsonl                  one line per epoch, appended and flushed
samples/epoch-0010.png         grid of images with fixed prompts and seeds
lora/epoch-0010.safetensors    and lora/latest.safetensors
lora/recommended.safetensors   the LoRA to use, with its strength baked in
model/                         instead of lora/ if all weights are trained, with the same names of files
evaluation/                    how its snapshots were judged, see trainer/evaluation
recommendation/                how it was chosen, see trainer/recommend
checkpoints/epoch-0010/        exact state
tastes/NAME.safetensors        the tastes it is scored by, fitted to the votes there were when it started
plots/*.png
"""

from pathlib import Path

from comfy_tdpo.tastes.names import FITTED, PREFIX

LORA, MODEL = "lora", "model"  # folders of snapshots; a run has one of them
CONFIG, PROMPTS, GRID_PROMPTS, METRICS = "config.toml", "prompts.txt", "grid-prompts.txt", "metrics.jsonl"
LOCK, TASTES = ".lock", "tastes"


class RunPaths:
    """The files of the run in the folder `path`, whether they exist or not.

    What is called a LoRA here holds all weights of the denoiser if these are trained.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, by the folder that was made for its configuration, which may be damaged."""
        return (self.path / MODEL).is_dir()

    @property
    def snapshots(self) -> Path:
        return self.path / (MODEL if self.trains_all else LORA)

    @property
    def latest_lora(self) -> Path:
        return self.snapshots / "latest.safetensors"

    @property
    def recommended_lora(self) -> Path:
        return self.snapshots / "recommended.safetensors"

    @property
    def recommendation(self) -> Path:
        return self.path / "recommendation"

    def lora(self, epoch: int) -> Path:
        return self.snapshots / f"{epoch_name(epoch)}.safetensors"

    def sample_grid(self, epoch: int) -> Path:
        return self.path / "samples" / f"{epoch_name(epoch)}.png"

    def taste(self, name: str) -> Path:
        """The run's own copy of the taste that is the reward `name`."""
        return self.path / TASTES / f"{name.removeprefix(PREFIX)}{FITTED}"

    def plot(self, name: str) -> Path:
        return self.path / "plots" / f"{name}.png"


def holds_run(folder: Path) -> bool:
    """Whether `folder` looks like a run: other programs may have a config.toml, but not the prompts too."""
    return (folder / CONFIG).is_file() and (folder / PROMPTS).is_file()


def run_nearby(path: Path) -> Path | None:
    """The run that a wrong `path` may mean: the one that contains it, or the newest one in it."""
    around = next((parent for parent in path.absolute().parents if holds_run(parent)), None)
    if around or not path.is_dir():
        return around
    inside = [folder for folder in path.iterdir() if holds_run(folder)]
    return max(inside, key=lambda folder: (folder / CONFIG).stat().st_mtime, default=None)


def epoch_name(epoch: int) -> str:
    return f"epoch-{epoch:04d}"


def epoch_in(path: Path) -> int | None:
    """The epoch in the name of a run's file; None if the name is not one that a run gives."""
    number = path.stem.removeprefix("epoch-")
    return int(number) if number.isdecimal() and path.stem == epoch_name(int(number)) else None
