"""From a run's folder to a recommendation: draw what is missing, choose, and write the results."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from comfy_tdpo import __version__, arithmetic
from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.counts import number_of
from comfy_tdpo.rewards import RewardModel, load_reward, load_rewards

from ..config import TrainConfig
from ..config.loadable import check_loadable
from ..run import RunFolder
from ..run.loras import read_lora
from ..run.tastes import weights_of
from ..state import Watch
from .choice import Outcome, Recommendation, Scores, judge
from .files import BASE, FRONTIER, PICTURE, Cell, Draw, Table, cells_of, image_file, write_choice
from .options import Options, held_out_reward, unseen_prompts

if TYPE_CHECKING:
    from comfy_tdpo.policy import DiffusionPolicy

    from ..training import Training

CLOSER = 3  # times as many images of the nearest cells, if none qualifies


def recommend(
    run: RunFolder,
    options: Options,
    device: torch.device,
    policy: "DiffusionPolicy | None" = None,
    check: Callable[[], None] = lambda: None,
    watch: Watch = lambda phase, done, total: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Recommendation:
    """Choose the LoRA of `run` to use and its strength, and write it as lora/recommended.safetensors.

    The run is locked meanwhile. Images that were drawn before are not drawn again.

    Args:
        policy: of the run, if it is already loaded; its trained weights are restored at the end.
        check: called between model calls; may raise an exception to stop, and everything drawn so far is kept.
        watch: sees the progress in images; tell: is told in one line what will be drawn.

    Raises:
        ValueError: the run has no LoRA, is in use, or cannot be drawn or scored as asked.
        RewardError: a reward failed.
    """
    with run.lock(), arithmetic.switched(deterministic=False):  # with the arithmetic of a run
        config = run.config
        name = held_out_reward(config, options.held_out)
        prompts, source = unseen_prompts(config, run.prompts(config), run.grid_prompts(config), options.prompts)
        cells = cells_of(run, options.strengths)
        tell(_described(config, cells, options, source))
        table = Table(run.recommendation)
        training, held_out = _load_rewards(run, config, name, device)
        for reward in (training, held_out):
            reward.check_prompts(prompts)
        policy = policy or _load_policy(config, device)
        # imports diffusers, which takes seconds; wrong options are reported before
        from .drawing import FRESH, Artist, Painter, draws_of, shown_of

        names, draws = (training.name, held_out.name), draws_of(prompts, options.images)
        shown = shown_of(draws)
        painter = Painter(config, policy, check)
        artist = Artist(painter, (training, held_out), shown, table, run.recommendation, watch)

        def drawn(cells: dict[Cell, list[Draw]], phase: str) -> dict[Cell, Scores]:
            artist.draw(cells, phase)
            return {cell: _scores(table, cell, draws, names) for cell, draws in cells.items()}

        before = {key: weight.detach().to("cpu", copy=True) for key, weight in policy.trainable.state().items()}
        try:
            scores = drawn(dict.fromkeys(cells, draws), "recommending")
            found = judge(names, scores, options.tolerance, source)
            if found.chosen is None and found.nearest:
                nearest = [BASE, *(outcome.cell for outcome in found.nearest)]
                more = dict.fromkeys(nearest, draws_of(prompts, CLOSER * options.images))
                found = judge(names, scores | drawn(more, "looking closer"), options.tolerance, source)
            if found.chosen is not None:
                fresh = dict.fromkeys([BASE, found.chosen.cell], draws_of(prompts, options.images, FRESH))
                found = found.checked(*drawn(fresh, "checking the choice").values())
            _write_lora(run, policy, found)
        finally:
            policy.trainable.load(before)
        _draw_pictures(run, found, shown)
        write_choice(run.recommendation, found.plain())
        return found


def _described(config: TrainConfig, cells: list[Cell], options: Options, source: str) -> str:
    snapshots = (len(cells) - 1) // len(options.strengths)
    strengths = ", ".join(f"{strength:g}" for strength in options.strengths)
    drawn = f"{number_of(snapshots, 'snapshot')} (strengths {strengths}) and the base model, "
    drawn += f"{options.images} images each ({config.drawn_with_told})"
    return f"{drawn}; prompts: {source}"


def _load_rewards(
    run: RunFolder, config: TrainConfig, held_out: str, device: torch.device
) -> tuple[RewardModel, RewardModel]:
    how = (device, config.reward_precision, weights_of(run, config))
    return load_rewards(config.rewards, *how, config.reward_scales), load_reward(held_out, *how)


def _load_policy(config: TrainConfig, device: torch.device) -> "DiffusionPolicy":
    check_loadable(config, "add the line output.recommend = true to the settings of TDPO-R Train and queue it")
    from ..assemble import load_policy

    return load_policy(config, device)


def _scores(table: Table, cell: Cell, draws: list[Draw], names: tuple[str, str]) -> Scores:
    training, held_out = names
    scores = {draw: table.scores(cell, draw) for draw in draws}
    return {draw: (line[training], line[held_out]) for draw, line in scores.items()}


def _write_lora(run: RunFolder, policy: "DiffusionPolicy", found: Recommendation) -> None:
    """Write the chosen LoRA with its strength baked in, or remove an earlier one if none is recommended now."""
    if found.fresh is None:
        run.recommended_lora.unlink(missing_ok=True)
        return
    cell = found.fresh.cell
    assert cell.file is not None, "the base model is never chosen"
    policy.trainable.load_exported(read_lora(cell.file), cell.strength)
    metadata = _metadata(run.config, found, found.fresh)
    write_atomically(run.recommended_lora, lambda file: policy.trainable.export(file, metadata))


def _metadata(config: TrainConfig, found: Recommendation, fresh: Outcome) -> dict[str, str]:
    from ..keeping import model_name

    return {
        "base_model": model_name(config.model),
        "algorithm": config.algorithm,
        "reward": found.training,
        "epoch": str(fresh.cell.epoch),
        "strength": f"{fresh.cell.strength:g}",
        "training_reward": f"{fresh.training:.6g}",
        "held_out": found.held_out,
        "held_out_reward": f"{fresh.held_out:.6g}",
        "comfy_tdpo": __version__,
    }


def _draw_pictures(run: RunFolder, found: Recommendation, shown: list) -> None:
    from ..plots.frontier import frontier_figure
    from ..plots.strengths import strengths_figure

    folder = run.recommendation
    write_atomically(folder / FRONTIER, frontier_figure(found).save)
    files = {
        outcome.cell: [image_file(folder, outcome.cell, draw) for draw in shown]
        for outcome in (found.base, *found.outcomes)
    }
    write_atomically(folder / PICTURE, strengths_figure(found, files).save)


# --- at the end of a training -----------------------------------------------------------------------------------------


def after_training(
    training: "Training", watch: Watch, tell: Callable[[str], None] = lambda text: None
) -> Recommendation:
    """What a finished training recommends.

    Raises:
        Stopped: the training was asked to stop meanwhile; everything drawn so far is kept.
    """
    from ..training import Stopped

    def check() -> None:
        if training.stop.is_set():
            raise Stopped

    options, config = Options(images=training.config.output.recommend_images), training.config
    with arithmetic.switched(config.deterministic):
        return recommend(training.run, options, training.policy.device, training.policy, check, watch, tell)
