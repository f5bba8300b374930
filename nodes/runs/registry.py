"""The runs in ComfyUI's output folder: the list of runs, and each one's status, metrics and pictures.

Everything that the routes and the nodes report about runs is made here, without ComfyUI and without a server.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.counts import number_of
from comfy_tdpo.rewards import name_of_sum
from comfy_tdpo.tastes.names import PREFIX

from ...trainer.alarm import alarm_of, ends_early, lora_before, unguarded
from ...trainer.config import TrainConfig
from ...trainer.job import ENDED, Job, find_job
from ...trainer.recommend.options import is_of_shapes
from ...trainer.run import EpochMetrics, RunFolder
from ...trainer.run.paths import CONFIG, epoch_in
from . import comparison
from .marks import mark_of
from .names import check_run_name, problem_with
from .wording import in_words_of_nodes, without_folders

Fields = dict[str, Any]


class NoSuchRun(ValueError):
    """A valid name that no run has."""


class NotRunning(ValueError):
    """There is nothing to stop."""


class NotEnded(ValueError):
    """The run trains, or waits for its turn."""


@dataclass(frozen=True)
class Runs:
    """All runs.

    Args:
        root: the folder that contains them; loras: ComfyUI's folder for LoRAs, where theirs go into `tdpo/`; models:
            the same for diffusion models, of runs that train all weights. None: these stay in their runs.
    """

    root: Path
    loras: Path
    models: Path | None = None

    def folder(self, name: str) -> RunFolder:
        """The folder of a run, whether it exists or not."""
        return RunFolder(self.root / check_run_name(name))

    def find(self, name: str) -> RunFolder:
        """The run of that name.

        Raises:
            NoSuchRun: there is none; ValueError: the name is invalid.
        """
        run = self.folder(name)
        if not self.exists(name):
            raise NoSuchRun(f"got run_name {name!r}; expected that of a run in output/tdpo: train it in TDPO-R Train")
        return run

    def exists(self, name: str) -> bool:
        return not problem_with(name) and (self.root / name / CONFIG).is_file()

    def all(self) -> list[RunFolder]:
        """All runs, newest first; other folders are skipped."""
        found = [path.parent for path in self.root.glob(f"*/{CONFIG}") if not problem_with(path.parent.name)]
        return [RunFolder(path) for path in sorted(found, key=lambda path: -modified(path / CONFIG))]

    def job(self, run: RunFolder) -> Job | None:
        """The job that trains the run, or trained it in this process."""
        job = find_job(run.path.name)
        return job if job is not None and job.run.path == run.path else None

    # --- reports ----------------------------------------------------------------------------------------------------

    def overview(self) -> Fields:
        return {"runs": [self.status(run) for run in self.all()]}

    def status(self, run: RunFolder) -> Fields:
        """The run's status, from its job or, if there is none, from its folder."""
        mark, grids = mark_of(run), comparison.grids(run)
        status = {
            "id": run.path.name,
            "node": mark.node,
            "workflow": mark.workflow,
            "lora": self.lora_name(run),
            "samples_epoch": grids[-1] if grids else None,
            "grids": grids,
            "kept": comparison.kept(run),
        }
        try:
            config, job = run.config, self.job(run)
            status |= {"reward": name_of_sum(config.rewards, config.reward_scales), "eval_rewards": config.measured}
            status["plan"] = plan_of(config)
            status["grid_shape"] = comparison.grid_shape_of(run, config)
            status |= _of_job(job) if job else _of_folder(run.metrics(), config)
            status["use"] = comparison.best_use(run, status["overoptimised"])
            status["strengths"] = comparison.strengths(run)
        except (ValueError, OSError) as error:
            status |= {
                "reward": "",
                "eval_rewards": [],
                **NOTHING_DONE,
                "use": None,
                "strengths": {},
                "plan": "",
                "grid_shape": None,
                "state": "failed",
            }
            status["error"] = f"the folder of run {run.path.name!r} is damaged: {error}"
        if status["error"]:
            status["error"] = self.told(status["error"])
        overoptimised, advised = _of_overoptimisation(run, status), advice(status, mark.wait, run.trains_all)
        queued = self.told(_of_unheeded(mark.unheeded))
        told = [self.told(mark.because), overoptimised, advised, queued, self._of_tastes(run, status)]
        return status | {"message": " ".join(filter(None, told))}

    def _of_tastes(self, run: RunFolder, status: Fields) -> str:
        """What a run on a taste lacks, and whether the taste has other votes now; empty if it trains on none."""
        if status["error"] or PREFIX not in status["reward"]:
            return ""
        from ...trainer.run.tastes import told_of_changes  # slow to import

        try:
            config = run.config
            texts = [unguarded(config), told_of_changes(run, config)]
        except (ValueError, OSError) as error:  # a damaged taste must not hide the runs
            return self.told(str(error))
        sentences = [self.told(text) for text in texts if text]
        return " ".join(f"{sentence[:1].upper()}{sentence[1:]}." for sentence in sentences)

    def metrics(self, run: RunFolder, after: int) -> Fields:
        new = [finite(line) for line in run.metrics() if line["epoch"] > after]
        return {"metrics": new, "next": new[-1]["epoch"] if new else after}

    def picture(self, run: RunFolder, name: str) -> bytes:
        """A picture of the run as PNG: its newest sample grid, or the rewards so far."""
        draw = PICTURES.get(name)
        if draw is None:
            raise ValueError(f"got picture {name!r}; expected one of {', '.join(PICTURES)}")
        return draw(run)

    def grid(self, run: RunFolder, epoch: int) -> bytes:
        """The sample grid of an epoch as PNG."""
        if epoch not in comparison.grids(run):
            raise NoSuchRun(f"run {run.path.name!r} has no samples of epoch {epoch}")
        return run.sample_grid(epoch).read_bytes()

    def evaluation(self, run: RunFolder) -> Fields:
        """The tables of the run's last evaluation."""
        return _of_evaluation(run, "kept_tables")

    def at_strength(self, run: RunFolder, epoch: int, strength: float) -> bytes:
        """What `recommend` has drawn with an epoch's LoRA at a strength, as PNG."""
        try:
            return comparison.at_strength(run, epoch, strength)
        except FileNotFoundError as error:
            raise NoSuchRun(str(error)) from error

    def stop(self, run: RunFolder) -> Fields:
        job = self.job(run)
        if job is None or job.status.state in ENDED:
            raise NotRunning(f"run {run.path.name!r} is not running; there is nothing to stop")
        job.stop()
        return self.status(run)

    def told(self, text: str) -> str:
        """`text` in the words of the graph, without this machine's folders, as browsers may be on other machines."""
        return without_folders(in_words_of_nodes(text).replace(f"{self.root}", "output/tdpo"))

    # --- the LoRAs for ComfyUI's Load LoRA --------------------------------------------------------------------------

    def lora_name(self, run: RunFolder) -> str | None:
        """The name of the run's LoRA, or of its whole model, in ComfyUI's lists; None before there is one.

        A file left there by an earlier run of the same name does not count.
        """
        folder = self._shared_folder(run)
        name = f"tdpo/{run.path.name}.safetensors"
        return str(Path(name)) if folder and (folder / name).is_file() and run.latest_lora.is_file() else None

    def share_loras(self, run: RunFolder) -> None:
        """Copy the run's newest LoRA, and the recommended one, to where ComfyUI's own Load LoRA finds them, or its
        whole models to where Load Diffusion Model does.

        A recommended LoRA that the run no longer has is removed there too.
        """
        folder = self._shared_folder(run)
        if folder is None:
            return
        copy = _link if run.trains_all else shutil.copyfile
        place, recommended = (folder / "tdpo" / kind / f"{run.path.name}.safetensors" for kind in ("", "recommended"))
        if run.latest_lora.is_file():
            write_atomically(place, partial(copy, run.latest_lora))
        if run.recommended_lora.is_file():
            write_atomically(recommended, partial(copy, run.recommended_lora))
        else:
            recommended.unlink(missing_ok=True)

    def _shared_folder(self, run: RunFolder) -> Path | None:
        """Where the run's files are shared; None for whole models that Load Diffusion Model would not know."""
        if not run.trains_all:
            return self.loras
        return None if is_of_shapes(run.config) else self.models


def _link(file: Path, place: Path) -> None:
    """Link to a whole model, which has gigabytes and is never changed in place, or copy it."""
    try:
        os.link(file, place)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, place)


def _of_job(job: Job) -> Fields:
    status = job.status
    return {
        "state": status.state,
        "epoch": status.epoch,
        "epochs": status.epochs,
        "phase": status.phase,
        "phase_done": status.phase_done,
        "phase_total": status.phase_total,
        "waits_for": status.waits_for,
        "eta_s": status.eta_s,
        "overoptimised": status.overoptimised,
        "error": status.error,
    }


def plan_of(config: TrainConfig) -> str:
    """What the run costs and with which settings, those of the preset included."""
    images = f"{config.epochs * config.samples_per_epoch:,} images of {number_of(config.steps, 'step')}"
    how = f"at {config.resolution} px with guidance {config.guidance:g}"
    if config.embedded_guidance is not None:
        how += f", embedded guidance {config.embedded_guidance:g}"
    if any(value != getattr(config, name) for name, value in config.drawn_with.items()):
        how += f" (samples: {config.drawn_with_told})"
    what = "all weights" if config.policy.trains_all else f"a LoRA of rank {config.policy.rank}"
    return f"{images} in {number_of(config.epochs, 'epoch')}, {how}, for {what} with learning rate {config.policy.lr:g}"


NOTHING_DONE: Fields = {
    "epoch": 0,
    "epochs": 0,
    "phase": "",
    "phase_done": 0,
    "phase_total": 0,
    "waits_for": None,
    "eta_s": None,
    "overoptimised": None,
    "error": None,
}


def _of_folder(metrics: list[EpochMetrics], config: TrainConfig) -> Fields:
    over, alarm = len(metrics) >= config.epochs or ends_early(metrics, config), alarm_of(metrics)
    done = {"state": "finished" if over else "interrupted", "epoch": len(metrics), "epochs": config.epochs}
    return NOTHING_DONE | done | {"overoptimised": alarm.since if alarm else None}


def advice(status: Fields, waits: bool, trains_all: bool = False) -> str:
    """What the user can do next; shown in the node.

    waits: whether its graph waits for the training to end; trains_all: whether its snapshots are whole models.
    """
    state, epoch, epochs = status["state"], status["epoch"], status["epochs"]
    match state:
        case "waiting" if status["waits_for"]:
            return (
                f"Waits for run {status['waits_for']!r} to end, then starts by itself. Stop takes it out of the queue."
            )
        case "waiting" | "running" if epoch == 0:
            return f"{status['plan']}. The curve starts when the first epoch ends."
        case "waiting" | "running":
            use = "The graph goes on when it ends." if waits else "Queue the graph to sample from the newest epoch."
            return f"{use} Stop when the images look right."
        case "stopping":
            return "Stops after the current step, then saves."
        case "finished" if epoch < epochs:
            ended = f"Ended after epoch {epoch} of {epochs}, saved."
            return f"{ended} To train on, set stop_on_overoptimisation (in settings) to false and queue the graph."
        case "finished":
            what, loader = ("model", "Load Diffusion Model") if trains_all else ("LoRA", "Load LoRA")
            use = f"{loader} lists its {what}; TDPO LoRA Apply applies it."
            if trains_all and not status["lora"]:  # Load Diffusion Model does not know this model
                use = "TDPO LoRA Apply applies its model."
            longer = f"To train longer, set epochs to more than {epochs}, such as {2 * epochs}, and queue the graph."
            return f"{use} {longer}"
        case "stopped" | "interrupted" if epoch == 0:
            return "Ended before an epoch had finished. Queue the graph to resume."
        case "failed":
            return "Fix what the error names, then queue the graph to resume from the last checkpoint."
    what = "Stopped" if state == "stopped" else "Interrupted"
    saved = f"{what} after epoch {epoch} of {epochs}, saved."
    return f"{saved} Queue the graph to resume, or set resume to 'as it is' to only use it."


def _of_unheeded(changes: str) -> str:
    """What to do about settings that were queued while the run trained; empty if there are none."""
    queued = f"It was queued with other settings while it trained: {changes}. Queue the graph again when it has ended."
    return queued if changes else ""


def _of_overoptimisation(run: RunFolder, status: Fields) -> str:
    """What the user can do about overoptimisation; empty if there is none."""
    if status["overoptimised"] is None:
        return ""
    lora = lora_before(run, status["overoptimised"])
    use = f"Use the snapshot of epoch {epoch_in(lora)}, or" if lora else "Use"
    return (
        f"Overoptimisation since epoch {status['overoptimised']}: the training reward rose while the held-out "
        f"{run.config.overoptimisation.reward} fell. {use} a later one at a lower strength."
    )


def modified(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 if there is none, as of a run that was just deleted."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def finite(metrics: EpochMetrics) -> dict[str, float | None]:
    """Metrics for JSON, with None for NaN and infinity, which JSON lacks."""
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}


# --- pictures ---------------------------------------------------------------------------------------------------------


def newest_grid(run: RunFolder) -> Path | None:
    """The newest of the run's own sample grids; files with other names are ignored."""
    grids = comparison.grids(run)
    return run.sample_grid(grids[-1]) if grids else None


def _samples(run: RunFolder) -> bytes:
    path = newest_grid(run)
    if path is None:
        raise NoSuchRun(f"run {run.path.name!r} has no samples yet; the first are drawn before its first epoch")
    return path.read_bytes()


def _rewards(run: RunFolder) -> bytes:
    import io

    from ...trainer.plots.curves import reward_figure

    buffer = io.BytesIO()
    reward_figure(run.metrics(), run.config).save(buffer, "png")
    return buffer.getvalue()


def _evaluated(run: RunFolder) -> bytes:
    return _of_evaluation(run, "kept_plot")


def _of_evaluation(run: RunFolder, what: str) -> Any:
    """What `evaluation.py` has of a run."""
    from . import evaluation  # slow to import

    try:
        return getattr(evaluation, what)(run)
    except FileNotFoundError as error:
        raise NoSuchRun(f"run {run.path.name!r} has not been evaluated yet; run a TDPO Evaluate node") from error


PICTURES: dict[str, Callable[[RunFolder], bytes]] = {
    "samples": _samples,
    "reward": _rewards,
    "evaluation": _evaluated,
}
