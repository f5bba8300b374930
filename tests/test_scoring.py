"""The scores and messages of the Score Images node."""

import pytest
import torch
from PIL import Image

from comfy_tdpo.nodes.comfy import scoring
from comfy_tdpo.nodes.comfy.scoring import captioned, described, opaque, prompt_of_each, score
from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
from comfy_tdpo.rewards import RewardError, load_reward
from comfy_tdpo.trainer.terminal.image_files import read_image

CPU = torch.device("cpu")


def images(count: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, 64, 64, channels, generator=torch.Generator().manual_seed(0))


def test_one_prompt_is_for_all_and_a_line_is_for_each():
    assert prompt_of_each("a red circle\n", 3) == ["a red circle"] * 3
    assert prompt_of_each("a\n\n b ", 2) == ["a", "b"]
    assert prompt_of_each("", 2) == ["", ""]
    with pytest.raises(ValueError, match="got 2 prompts for 3 images; expected one line for all"):
        prompt_of_each("a\nb", 3)
    with pytest.raises(ValueError, match="got no images"):
        prompt_of_each("a", 0)


@pytest.mark.parametrize("count", [1, 16, 17])
def test_scores_are_the_rewards_own(count):
    choice = RewardChoice({"shapes-aesthetic": 2.0, "shapes-alignment": -1.0})
    batch, prompts = images(count), ["a red circle"] * count
    with torch.inference_mode():  # as ComfyUI runs its nodes
        scores = score(batch, prompts, choice, CPU)
    pixels = batch.movedim(-1, 1)
    aesthetic, alignment = (load_reward(f"shapes-{name}", CPU) for name in ("aesthetic", "alignment"))
    expected = 2 * aesthetic.score(pixels, prompts) - alignment.score(pixels, prompts)
    # float32, in batches of another size
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-4)


def test_a_reward_that_a_node_loaded_can_still_be_used_by_a_training(monkeypatch):
    kept, load = [], scoring.load_rewards
    monkeypatch.setattr(scoring, "load_rewards", lambda *asked, **more: kept.append(load(*asked, **more)) or kept[0])
    with torch.inference_mode():
        score(images(1), [""], RewardChoice({"shapes-aesthetic": 1.0}), CPU)
    assert load_reward("shapes-aesthetic", CPU) is kept[0]
    assert not any(parameter.is_inference() for parameter in kept[0].head.parameters())


def test_a_reward_is_loaded_from_its_file():
    choice = RewardChoice({"jpeg-compressibility": 1.0}, {"jpeg-compressibility": "/a/file.pt"})
    with pytest.raises(
        ValueError, match="got /a/file.pt as the weights of reward 'jpeg-compressibility', which has none"
    ):
        score(images(1), [""], choice, CPU)


def test_transparent_images_are_flattened_on_white():
    choice = RewardChoice({"shapes-aesthetic": 1.0})
    batch = images(2, channels=4)
    colours, alpha = batch[..., :3], batch[..., 3:]
    on_white = colours * alpha + (1 - alpha)
    assert score(batch, ["", ""], choice, CPU) == score(on_white, ["", ""], choice, CPU)
    assert score(batch, ["", ""], choice, CPU) != score(colours, ["", ""], choice, CPU)
    shown = captioned(batch, [1.0, 2.0])
    assert shown.shape[-1] == 3
    torch.testing.assert_close(shown[:, :64], on_white, rtol=0, atol=0.5 / 255 + 1e-6)  # of eight bits


def test_a_node_and_the_command_line_see_the_same_image(tmp_path):
    levels = (images(1, channels=4)[0] * 255).round().byte()
    Image.fromarray(levels.numpy()).save(tmp_path / "a.png")
    from_file = read_image(tmp_path / "a.png").movedim(1, -1)
    torch.testing.assert_close(opaque(levels[None] / 255), from_file, rtol=0, atol=1.01 / 255)  # Pillow rounds


def test_flattening_leaves_the_images_that_came_in_as_they_are():
    batch = images(2)
    opaque(batch).zero_()
    assert batch.max() > 0


def test_a_small_scale_is_not_rounded_away():
    choice = RewardChoice({"hpsv2": 1.0})
    assert described([0.281, 0.282], choice).splitlines()[0] == "hpsv2: 0.2815 ± 0.0007071"


@pytest.mark.parametrize(
    ("batch", "weight", "message"),
    [
        (images(1), 0.0, "the weights of jpeg-compressibility are all 0; give at least one reward another weight"),
        (images(1, channels=1), 1.0, "got images of 1 channels; expected 3"),
        (images(1, channels=5), 1.0, "got images of 5 channels; expected 3"),
        (images(1) * torch.nan, 1.0, "got images that are not finite for reward 'jpeg-compressibility'"),
    ],
    ids=["no weight", "grey", "five channels", "NaN"],
)
def test_what_cannot_be_scored_is_one_sentence(batch, weight, message):
    with pytest.raises((ValueError, RewardError), match=message):
        score(batch, [""], RewardChoice({"jpeg-compressibility": weight}), CPU)


def test_prompts_that_a_reward_cannot_judge_are_one_sentence():
    with pytest.raises(ValueError, match="shapes-gold can only judge prompts of Shapes"):
        score(images(1), ["a photo of a cat"], RewardChoice({"shapes-gold": 1.0}), CPU)


def test_the_text_has_the_mean_the_spread_and_each():
    choice = RewardChoice({"shapes-aesthetic": 1.0, "shapes-gold": 2.0})
    assert described([1.0, 3.0], choice) == "shapes-aesthetic + 2 shapes-gold: 2.000 ± 1.414\n1: 1.000\n2: 3.000"
    assert described([1.0], choice).splitlines()[0] == "shapes-aesthetic + 2 shapes-gold: 1.000"


def test_captions_leave_the_images_as_they_are_and_differ():
    batch = images(2)
    out = captioned(batch, [1.0, -23.456])
    assert out.shape[0] == 2 and out.shape[1] > 64 and out.shape[2:] == (64, 3)
    torch.testing.assert_close(out[:, :64], batch, rtol=0, atol=0.5 / 255 + 1e-6)  # of eight bits
    strips = out[:, 64:]
    assert strips.min() < 0.3 and strips.max() == 1 and not torch.equal(strips[0], strips[1])
    assert scoring.captioned(torch.rand(1, 8, 8, 3), [1.0]).shape == (1, 20, 8, 3)
