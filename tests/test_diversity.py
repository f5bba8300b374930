"""How different the images of a prompt are, compared with pairs counted by hand."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from comfy_tdpo.diversity import diversity


def test_two_images_at_a_right_angle_are_at_distance_one_and_opposite_ones_at_two():
    x, y = [1.0, 0.0], [0.0, 1.0]
    assert diversity(torch.tensor([x, y]), ["a", "a"]) == pytest.approx(1)
    assert diversity(torch.tensor([x, [-3.0, 0.0]]), ["a", "a"]) == pytest.approx(2), "lengths do not count"
    assert diversity(torch.tensor([x, x]), ["a", "a"]) == pytest.approx(0)


def test_without_two_images_of_one_prompt_there_is_no_value():
    assert diversity(torch.eye(3), ["a", "b", "c"]) is None


def test_prompts_count_by_their_images_less_one():
    """Prompt a: distances 1, 1, 0 of three pairs, mean 2/3, weight 2. Prompt b: distance 0, weight 1. c: one image."""
    x, y = [1.0, 0.0], [0.0, 1.0]
    embeds = torch.tensor([x, y, x, y, x, y])
    assert diversity(embeds, ["a", "b", "a", "a", "c", "b"]) == pytest.approx((2 * 2 / 3 + 1 * 0) / 3)


def test_it_is_the_mean_over_the_pairs_of_each_prompt():
    embeds = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    prompts = [f"prompt {i * i % 7}" for i in range(40)]
    total = weight = 0.0
    for prompt in set(prompts):
        rows = [i for i in range(40) if prompts[i] == prompt]
        distances = [1 - (embeds[i] @ embeds[j]).item() for i, j in combinations(rows, 2)]
        if distances:
            total, weight = total + (len(rows) - 1) * sum(distances) / len(distances), weight + len(rows) - 1
    assert diversity(embeds, prompts) == pytest.approx(total / weight, rel=1e-5)  # float32 products
