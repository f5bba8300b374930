"""What the plots show, given made-up metrics; how they look is checked by eye."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.metrics import readable
from comfy_tdpo.trainer.plots.curves import HEADER, LEFT, RIGHT, critic_panels, reward_figure, reward_panels, save_plots
from comfy_tdpo.trainer.plots.drawing import DPI, WIDTH
from comfy_tdpo.trainer.plots.image_grid import save_image_grid
from comfy_tdpo.trainer.run import RunFolder

CRITIC = {"critic/explained_variance": 0.3, "neurons/dormant_percent": 10.0, "neurons/reset_count": 0}


def epochs(count: int, **more: float) -> list[dict[str, float]]:
    lines = []
    for epoch in range(1, count + 1):
        line = {"epoch": epoch, "reward_queries": 48 * epoch}
        line |= {"reward/shapes-aesthetic/mean": 5 + 0.1 * epoch, "reward/shapes-aesthetic/std": 1.2}
        line |= {"eval/shapes-judge/mean": 0.5, "eval/shapes-gold/mean": 0.6 - 0.01 * epoch}
        lines.append(line | more)
    return lines


def make_run(path: Path, metrics: list[dict[str, float]], algorithm: str = "tdpo-r") -> RunFolder:
    run = RunFolder(path / "run").create(make_config(overrides={"algorithm": algorithm}))
    for line in metrics:
        run.append_metrics(line)
    return run


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))


# --- image grids


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (16, 4, 4)])
def test_a_grid_holds_every_image_in_reading_order(tmp_path, count, columns, rows):
    images = torch.rand(count, 3, 8, 8)
    save_image_grid(images, tmp_path / "samples" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "samples" / "grid.png"))  # (H, W, 3)
    assert grid.shape == (rows * 10 - 2, columns * 10 - 2, 3)
    for i, image in enumerate(images):
        y, x = i // columns * 10, i % columns * 10
        expected = (image.permute(1, 2, 0) * 255).round().numpy()
        assert np.array_equal(grid[y : y + 8, x : x + 8], expected)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["grid.png"]


def test_a_grid_clamps_and_takes_half_precision(tmp_path):
    save_image_grid(torch.tensor([-0.5, 0.0, 1.5]).reshape(1, 3, 1, 1).bfloat16(), tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").getpixel((0, 0)) == (0, 0, 255)


# --- which plots there are


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_run_with_a_critic_has_three_plots(tmp_path, count):
    run = make_run(tmp_path, epochs(count, **CRITIC))
    paths = save_plots(run)
    assert paths == [run.plot(name) for name in ("reward", "neurons", "critic")]
    assert {Image.open(path).width for path in paths} == {1600}


def test_a_run_without_a_critic_has_its_rewards(tmp_path):
    run = make_run(tmp_path, epochs(3), "ddpo-2")
    assert save_plots(run) == [run.plot("reward")]
    assert list(run.plot("reward").parent.iterdir()) == [run.plot("reward")]


def test_a_loras_neurons_are_plotted_without_a_critic(tmp_path):
    run = make_run(tmp_path, epochs(3, **{"policy_neurons/dormant_percent": 4.0}), "ddpo-2")
    assert save_plots(run) == [run.plot("reward"), run.plot("neurons")]


def test_a_run_without_an_epoch_has_no_plots_but_a_figure(tmp_path):
    run = make_run(tmp_path, [])
    assert save_plots(run) == []
    assert reward_figure([], run.config).size[0] == 1600


# --- what they show


def test_each_reward_of_a_sum_has_a_panel_and_is_shown_once():
    """Also one that is listed as held out."""
    name = "shapes-aesthetic + 0.5 shapes-judge"
    line = {"epoch": 1, "reward_queries": 48, f"reward/{name}/mean": 5.0, f"reward/{name}/std": 1.0}
    line |= {f"{kind}/mean": 1.0 for kind in ("reward/shapes-aesthetic", "reward/shapes-judge", "eval/shapes-judge")}
    config = make_config(overrides={"rewards": {"shapes-aesthetic": 1.0, "shapes-judge": 0.5}})
    panels = reward_panels([line, line | {"epoch": 2, "reward_queries": 96}], config)
    shown = [(panel.title, panel.subtitle.split(":")[0]) for panel in panels]
    assert shown == [(name, "trained on"), *((part, "part of the sum") for part in config.rewards)]


def test_each_reward_has_a_panel_the_training_reward_first():
    panels = reward_panels(epochs(2, **{"guard/shapes-alignment/mean": 0.4}), make_config())
    titles = ["shapes-aesthetic", "shapes-alignment", "shapes-judge", "shapes-gold"]
    assert [panel.title for panel in panels] == titles
    assert [panel.subtitle.split(":")[0] for panel in panels] == ["trained on", "guard", "held out", "held out"]
    assert [line.band for panel in panels for line in panel.lines] == ["reward/shapes-aesthetic/std", None, None, None]


def test_a_figure_grows_with_each_held_out_reward():
    config = make_config()
    more = [{}, {"eval/more/mean": 1.0}, {"eval/more/mean": 1.0, "eval/most/mean": 1.0}]
    heights = [reward_figure(epochs(2, **rewards), config).height for rewards in more]
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=1)  # a pixel of rounding
    assert heights[0] < heights[1]


def test_resets_are_marked():
    config = make_config()
    plain, unreset = reward_figure(epochs(4), config), reward_figure(epochs(4, **CRITIC), config)
    critic, lora = (
        reward_figure(epochs(4, **{f"{group}/reset_count": 7}), config) for group in ("neurons", "policy_neurons")
    )
    assert same(plain, unreset)
    assert not same(plain, critic) and same(critic, lora)


def test_metrics_that_start_later_are_drawn(tmp_path):
    metrics = epochs(3, **CRITIC)
    for line in metrics[1:]:
        line["neurons/overlap_percent"] = 80.0
    run = make_run(tmp_path, metrics)
    picture = np.asarray(Image.open(save_plots(run)[1])).astype(int)  # (H, W, 3)
    vermilion = (abs(picture - np.array([0xD5, 0x5E, 0x00])) < 3).all(-1).any(0).nonzero()[0]
    left, width = DPI * LEFT, DPI * (WIDTH - LEFT - RIGHT)
    second = left + width * 96 / (1.01 * 144)  # of three epochs of 48 queries
    assert vermilion.min() == pytest.approx(second, abs=DPI / 20)  # half a marker and half a line


@pytest.mark.parametrize(("worst", "low", "cut"), [(0.1, -0.05, False), (-0.5, -0.55, False), (-30.0, -1.0, True)])
def test_an_untrained_critic_does_not_flatten_its_plot(worst, low, cut):
    metrics = epochs(2, **CRITIC)
    metrics[0]["critic/explained_variance"] = worst
    (panel,) = critic_panels(metrics)
    assert panel.limits == (pytest.approx(low), 1.03)
    assert ("cut off" in panel.subtitle) == cut


@pytest.mark.parametrize(
    ("value", "like", "sign", "text"),
    [(6.314, None, "", "6.31"), (0.2777, None, "", "0.278"), (0.2, 6.3, "+", "+0.20"), (-0.0123, 0.6, "+", "-0.012")],
)
def test_rewards_are_readable_at_their_own_scale(value, like, sign, text):
    assert readable(value, like, sign) == text


def test_importing_is_cheap_and_drawing_has_no_global_state():
    code = """
import sys
from comfy_tdpo.trainer.plots.curves import reward_figure
from comfy_tdpo.trainer.config import make_config
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
line = {"epoch": 1, "reward_queries": 48, "reward/shapes-aesthetic/mean": 5.0, "reward/shapes-aesthetic/std": 1.0}
reward_figure([line], make_config())
assert "matplotlib.pyplot" not in sys.modules and matplotlib.rcParams.copy() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


# --- diversity and overoptimisation


def test_diversity_has_a_panel_if_any_epoch_has_it():
    config, metrics = make_config(), epochs(4)
    without = [panel.title for panel in reward_panels(metrics, config)]
    assert "Diversity" not in without
    metrics[2]["diversity"] = 0.3
    assert [panel.title for panel in reward_panels(metrics, config)] == [*without, "Diversity"]
    assert not same(reward_figure(metrics, config), reward_figure(epochs(4), config))


def test_the_epochs_since_it_overoptimises_are_shaded():
    """From the second of four epochs, at 96 of 0 to 192 * 1.01 queries, to the last."""
    config, metrics = make_config(), epochs(4)
    plain = np.asarray(reward_figure(metrics, config)).astype(int)
    seen = {"overoptimisation/fall": 0.3, "overoptimisation/standard_errors": 4.0, "overoptimisation/since": 2}
    metrics[3] |= seen
    shaded = np.asarray(reward_figure(metrics, config)).astype(int)
    changed = (plain != shaded).any(-1)[plain.shape[0] // 3 : plain.shape[0] // 2].mean(0) > 0.5
    assert (plain != shaded)[: round(HEADER * DPI)].any(), "the legend says so"
    left, width = LEFT * DPI, (WIDTH - LEFT - RIGHT) * DPI
    (columns,) = changed.nonzero()
    assert columns[0] == pytest.approx(left + width * 96 / 193.92, abs=2)
    assert columns[-1] == pytest.approx(left + width * 192 / 193.92, abs=2)
