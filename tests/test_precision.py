"""How far a precision moves the ratio: what the page is computed from."""

import math

import pytest
import torch
from benchmark_files import benchmark

from comfy_tdpo.process.gaussian import log_prob

precision = benchmark("precision")


def test_a_log_ratio_is_that_of_the_densities(generator):
    old, new, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.5, 1.0, 2.0]).view(-1, 1, 1, 1)
    sample = old + sigma * noise
    expected = log_prob(sample, new, sigma) - log_prob(sample, old, sigma)
    torch.testing.assert_close(precision.log_ratios((new - old) / sigma, noise), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounding", [0.005, 0.01, 0.035])
def test_what_is_clipped_by_rounding_alone_is_what_is_found_on_large_latents(generator, rounding):
    draws, size = 400, precision.REFERENCE_SIZE
    moved, noise = (torch.randn(draws, 1, 1, size, generator=generator) for _ in range(2))
    found = precision.log_ratios(rounding * moved, noise).abs() > precision.CLIP
    line = {"precision": "", "updates": 1, "change_moved": [rounding]}
    line |= dict.fromkeys(("log_ratio", "log_ratio_float32", "log_ratio_of_precision"), [0.0])
    share = float(precision.cells(line)[-1].rstrip("%")) / 100
    assert abs(share - found.float().mean()) < 4 * math.sqrt(0.25 / draws)  # four standard errors
