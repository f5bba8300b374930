"""Samples of one prompt in groups: their baselines, how different their images are, and the prompts of an epoch."""

import statistics

import pytest
import torch
from toy import fast_training, new_run, toy_config

from comfy_tdpo.methods import groups
from comfy_tdpo.methods.window import window
from comfy_tdpo.trainer.config import make_config, presets


def test_the_baseline_is_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 2.0, 6.0, -1.0, 0.5, 3.0])
    expected = []
    for first in (0, 3):
        group = rewards[first : first + 3].tolist()
        expected += [own - statistics.fmean(group[:i] + group[i + 1 :]) for i, own in enumerate(group)]
    assert groups.standard(rewards, 3, "none")(rewards).tolist() == pytest.approx(expected, rel=1e-6)  # float32


def test_two_samples_are_two_of_their_groups_deviations_apart():
    """R - mean is plus or minus one deviation in a pair; leaving the sample itself out doubles it."""
    rewards = torch.tensor([3.0, 1.0, 100.0, 107.0])
    got = groups.standard(rewards, 2, "group")(rewards)
    assert got.tolist() == pytest.approx([2, -2, -2, 2], rel=2e-6)  # the 1e-6 beside deviations of 1 and 3.5


def test_the_batchs_deviation_is_that_of_all_rewards():
    rewards = torch.tensor([3.0, 1.0, 10.0, 12.0])
    expected = [value / statistics.pstdev(rewards.tolist()) for value in (2, -2, -2, 2)]
    assert groups.standard(rewards, 2, "batch")(rewards).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("std", ["batch", "group", "none"])
def test_groups_sum_to_zero_and_equal_rewards_give_zero(std, generator):
    rewards = torch.randn(12, generator=generator)
    rewards[4:8] = 0.1  # not a number that binary fractions can tell exactly
    got = groups.standard(rewards, 4, std)(rewards)
    assert torch.equal(got[4:8], torch.zeros(4))
    assert got.unflatten(0, (3, 4)).sum(1).tolist() == pytest.approx([0, 0, 0], abs=1e-5)  # float32, below 10
    equal = torch.full((12,), 0.1)
    assert torch.equal(groups.standard(equal, 4, std)(equal), torch.zeros(12))


def test_the_mean_of_the_others_leaves_the_gradient_unbiased():
    """Of E[x] for x ~ N(theta, 1), whose score is x - theta: the gradient is 1. With the whole group's mean, it is
    1 - 1/G."""
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = (groups.leave_one_out(x.flatten(), 2) * x.flatten()).mean().item()
    assert gradient == pytest.approx(1, abs=0.02)  # standard error 0.003


# --- diversity


def unit(*degrees: float) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_a_factor_is_the_distance_to_the_nearest_neighbour_over_the_groups_mean():
    embeds = unit(0, 60, 90, 10, 10, 100)
    distance = [1 - 0.5, 1 - 3**0.5 / 2, 1 - 3**0.5 / 2, 0, 0, 1]
    mean = [sum(distance[:3]) / 3] * 3 + [sum(distance[3:]) / 3] * 3
    expected = [d / m for d, m in zip(distance, mean, strict=True)]
    assert groups.diversity_factors(embeds, 3).tolist() == pytest.approx(expected, abs=1e-5)  # float32 cosines


def test_identical_images_are_equally_different(generator):
    embeds = torch.nn.functional.normalize(torch.randn(1, 16, generator=generator), dim=-1).expand(4, -1)
    assert torch.equal(groups.diversity_factors(embeds, 4), torch.ones(4))


def test_only_positive_advantages_change():
    got = groups.favour_diversity(torch.tensor([[1.0, -1.0], [2.0, -2.0]]), torch.tensor([3.0, 0.5]))
    assert got.tolist() == [[3, -1], [1, -2]]


# --- in a training


def test_an_epochs_prompts_come_in_groups(tmp_path):
    single, grouped = (
        fast_training(new_run(tmp_path / str(size), samples_per_prompt=size, samples_per_epoch=8 * size))
        for size in (1, 4)
    )
    assert grouped._epoch_prompts(3) == [prompt for prompt in single._epoch_prompts(3) for _ in range(4)]
    assert len(set(single._epoch_prompts(3))) > 4


@pytest.mark.parametrize("algorithm", ["tdpo-r", "ddpo-100"])
def test_a_training_compares_within_its_groups(tmp_path, algorithm):
    settings = {"algorithm": algorithm, "samples_per_prompt": 4, "moments": {"baseline": "group", "group_std": "none"}}
    training = fast_training(new_run(tmp_path / "run", **settings))
    training._sample()
    progress = training.context.progress
    rewards = progress.batch().rewards.double().unflatten(0, (2, 4))
    expected = (4 / 3 * (rewards - rewards.mean(1, keepdim=True))).flatten()
    returns = progress.targets["returns"].double()
    torch.testing.assert_close(returns, expected[:, None].expand_as(returns), rtol=1e-5, atol=1e-7)


def test_a_training_favours_diversity(tmp_path):
    both = []
    for on in (False, True):
        settings = {"samples_per_prompt": 4, "favour_diversity": on}
        training = fast_training(new_run(tmp_path / str(on), **settings))
        training._sample()
        both.append(training.context.progress.targets["temporal_rewards"])
    factors = groups.diversity_factors(training.context.progress.batch().final_embeds, 4)
    factors = factors[:, None].expand_as(both[0])
    expected = torch.where(both[0] > 0, both[0] * factors, both[0])
    assert torch.equal(both[1], expected) and not torch.equal(*both)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_prompt": 3}, "samples_per_epoch 8 is not a multiple of samples_per_prompt 3; choose a divisor"),
        ({"moments": {"baseline": "group"}}, "moments.baseline group compares the images of one prompt, but"),
        ({"favour_diversity": True}, "favour_diversity compares the images of one prompt, but samples_per_prompt is 1"),
    ],
)
def test_contradictions_are_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        toy_config(**settings)
    assert "\n" not in str(error.value)


def test_diversity_needs_an_encoder(tmp_path):
    settings = {"algorithm": "ddpo-100", "samples_per_prompt": 2, "favour_diversity": True}
    training = fast_training(new_run(tmp_path / "run", **settings))
    training.context.reward.embed_dim = None
    with pytest.raises(ValueError, match="got favour_diversity with reward 'brightness', which has no image encoder"):
        type(training.method)(training.context)


# --- grpo


def test_grpo_compares_as_grpo_does_but_for_the_sample_itself(tmp_path):
    """GRPO's (R - mean) / std times G / (G - 1), clipped at 5."""
    size = 64
    settings = {"algorithm": "grpo", "samples_per_prompt": size, "samples_per_epoch": 2 * size}
    training = fast_training(new_run(tmp_path / "run", **settings))
    score = training.context.reward.score
    training.context.reward.score = lambda images, prompts: (500 * (score(images, prompts) - 0.5)).exp()  # outliers
    training._sample()
    progress = training.context.progress
    rewards = progress.batch().rewards.double().unflatten(0, (2, size))
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    expected = (size / (size - 1) * advantages).flatten()
    assert expected.max() > 5
    found = progress.targets["temporal_rewards"].double()
    torch.testing.assert_close(found, expected.clamp(-5, 5)[:, None].expand_as(found), rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("preset", presets())
def test_grpo_trains_all_steps_but_the_last(preset):
    config = make_config(preset, overrides={"algorithm": "grpo"})
    stochastic = torch.ones(config.steps, dtype=torch.bool)
    of_flow = preset.startswith(("sd3", "flux", "z-image", "shapes-flow"))
    noiseless = config.process is not None or of_flow  # the last step of few-step models and of flow matching
    stochastic[-1] = not noiseless
    assert window(config.policy, stochastic).tolist() == [True] * (config.steps - 1) + [False]
    assert config.samples_per_epoch // config.samples_per_update == 2 and config.updates == "trajectory"
