"""Rewards to temporal rewards, against plain Python loops over the whole history."""

import json
import random
import statistics

import numpy as np
import pytest
import torch

from comfy_tdpo.methods.advantages import RewardMoments, returns, temporal_rewards
from comfy_tdpo.methods.kl_control import KLCoefficient

PROMPTS = ["a cat", "a dog", "a fox", "Four wolves, and a café"]


def random_epochs(count: int) -> list[tuple[list[str], torch.Tensor]]:
    """Prompts of unlike frequency and unlike rewards; float32 values, as reward models give them."""
    rng, epochs = random.Random(0), []
    for _ in range(count):
        prompts = rng.choices(PROMPTS, weights=[8, 4, 2, 1], k=12)
        rewards = [rng.gauss(3 * PROMPTS.index(prompt), 1 + PROMPTS.index(prompt)) for prompt in prompts]
        epochs.append((prompts, torch.tensor(rewards)))
    return epochs


def normalized_by_hand(history: dict[str, list[float]], prompts: list[str], rewards: list[float]) -> list[float]:
    """The specification: the last 32 rewards of a prompt, once there are 16; the batch's before that."""
    for prompt, reward in zip(prompts, rewards, strict=True):
        history.setdefault(prompt, []).append(reward)
    result = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        recent = history[prompt][-32:]
        data = recent if len(recent) >= 16 else rewards
        result.append((reward - statistics.fmean(data)) / (statistics.pstdev(data) + 1e-6))
    return result


def test_moments_against_the_whole_history():
    moments, history = RewardMoments(), {}
    for prompts, rewards in random_epochs(40):
        expected = normalized_by_hand(history, prompts, rewards.tolist())
        got = moments.add(prompts, rewards)(rewards)
        assert got.dtype == torch.float32
        assert got.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)  # computed in float64, stored in float32
    counts = {prompt: len(values) for prompt, values in history.items()}
    assert counts["a cat"] > 64 and counts[PROMPTS[-1]] >= 16, "the epochs must cross both limits"


@pytest.mark.parametrize(("buffer_size", "min_count"), [(32, 16), (5, 3)])
def test_the_buffer_takes_the_new_rewards_in_first(buffer_size, min_count):
    moments = RewardMoments(buffer_size, min_count)
    rewards = torch.arange(float(min_count))
    got = moments.add(["a cat"] * min_count, rewards)(rewards)
    expected = (rewards.numpy() - rewards.numpy().mean()) / rewards.numpy().std()
    assert got.tolist() == pytest.approx(expected.tolist(), rel=3e-6)  # the 1e-6 beside a standard deviation near 1
    outlier = torch.tensor([100.0])
    one_more = moments.add(["a cat"], outlier)(outlier).item()
    # one reward alone is its batch's mean; against a buffer that lacks it, it would be 24 deviations out
    assert 1 < one_more < 5
    moments.add(["a cat"] * buffer_size, torch.full((buffer_size,), 7.0))
    assert moments.state_dict() == {"a cat": [7.0] * buffer_size}


def test_equal_rewards_are_not_divided_by_zero():
    rewards = torch.full((20,), 5.0)
    assert torch.equal(RewardMoments().add(["a cat"] * 20, rewards)(rewards), torch.zeros(20))


def test_prompts_and_rewards_must_match():
    with pytest.raises(ValueError):
        RewardMoments().add(["a cat"], torch.zeros(2))


def test_moments_go_through_json_without_loss():
    epochs = random_epochs(30)
    original = RewardMoments()
    for prompts, rewards in epochs[:15]:
        original.add(prompts, rewards / 3)
    restored = RewardMoments()
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.state_dict() == original.state_dict()
    for prompts, rewards in epochs[15:]:
        assert all(
            torch.equal(*pair)
            for pair in zip(restored.add(prompts, rewards), original.add(prompts, rewards), strict=True)
        )


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
def test_returns_against_a_double_loop(generator, gamma):
    rewards, penalties = torch.randn(5, generator=generator), torch.rand(5, 7, generator=generator)
    given = penalties.clone()
    got = returns(rewards, penalties, gamma)
    for b in range(5):
        for k in range(7):
            expected = 0.0
            for j in range(k, 7):
                reward = -given[b, j].item() + (rewards[b].item() if j == 6 else 0.0)
                expected += gamma ** (j - k) * reward
            assert got[b, k].item() == pytest.approx(expected, abs=1e-6)  # a float32 sum of seven terms below 1
    assert torch.equal(penalties, given)


def test_without_a_penalty_the_return_is_the_reward(generator):
    rewards = torch.randn(4, generator=generator)
    assert torch.equal(returns(rewards, torch.zeros(4, 6)), rewards[:, None].expand(4, 6))


def test_temporal_rewards_are_normalised_over_all_samples_and_steps(generator):
    targets = torch.randn(6, 5, generator=generator) + torch.arange(5)  # unlike means from step to step
    residuals = torch.randn(6, 5, generator=generator)
    raw = targets.double().numpy() - residuals.double().numpy()
    expected = (raw - raw.mean()) / (raw.std() + 1e-8)
    got, std = temporal_rewards(targets, residuals)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-6)  # float32, |T| < 4
    assert got.mean(0).abs().max() > 0.5, "normalised per step, this would be 0"


def test_steps_that_are_not_trained_change_no_temporal_reward(generator):
    targets, residuals = torch.randn(2, 6, 5, generator=generator)
    trained = torch.tensor([True, False, True, True, False])
    expected, expected_std = temporal_rewards(targets[:, trained], residuals[:, trained])
    residuals[:, ~trained] += 100
    got, std = temporal_rewards(targets, residuals, trained)
    assert torch.equal(got[:, trained], expected) and torch.equal(std, expected_std)


def test_a_perfect_critic_leaves_no_temporal_reward():
    assert torch.equal(temporal_rewards(torch.ones(2, 3), torch.ones(2, 3))[0], torch.zeros(2, 3))


def test_a_fixed_coefficient_stays():
    coefficient = KLCoefficient(0.3)
    coefficient.update(kl=1e6, samples=256)
    assert coefficient.value == 0.3


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (4.0, 1.0),  # on target
        (4.4, 1 + 0.1 * 256 / 10_000),  # a tenth above
        (3.6, 1 - 0.1 * 256 / 10_000),
        (400.0, 1 + 0.2 * 256 / 10_000),  # clamped
        (0.0, 1 - 0.2 * 256 / 10_000),
    ],
)
def test_an_adaptive_coefficient_moves_towards_its_target(kl, factor):
    coefficient = KLCoefficient(0.3, target=4.0)
    coefficient.update(kl, samples=256)
    assert coefficient.value == pytest.approx(0.3 * factor, rel=1e-12)  # float64
    coefficient.update(kl, samples=256)
    assert coefficient.value == pytest.approx(0.3 * factor**2, rel=1e-12)
