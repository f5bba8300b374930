"""AdamW in bf16 and 8 bits: right on average, as AdamW in float32 is right, and the same again after a stop."""

import pytest
import torch
from torch import nn

from comfy_tdpo.low_precision import BF16, FLOAT8, LowPrecisionAdamW, restored, rounded, shortened
from comfy_tdpo.optimizers import adamw
from comfy_tdpo.settings import OptimizerSettings


@pytest.mark.parametrize(("bits", "dtype"), [(BF16, torch.bfloat16), (FLOAT8, torch.float8_e4m3fn)])
def test_rounding_gives_neighbours_in_the_format_and_the_value_on_average(bits, dtype, generator):
    values = torch.tensor([1.03, -1.03, 0.7, 100.0, -3.3])
    drawn = rounded(values.expand(20_000, 5), bits, generator)
    assert torch.equal(drawn.to(dtype).float(), drawn), "the format has it"
    step = 2.0 ** (values.abs().log2().floor() - bits)  # between neighbours
    assert ((drawn - values).abs() < step).all()
    # five standard errors of 20,000 draws of two values that are a step apart
    assert ((drawn.mean(0) - values).abs() < 5 * step / 2 / 20_000**0.5).all()


def test_codes_have_the_shape_of_the_values_and_their_size(generator):
    values = torch.randn(7, 300, generator=generator) * torch.logspace(-6, 0, 7)[:, None]
    codes, scales = shortened(values, generator)
    assert (codes.dtype, codes.shape, len(scales)) == (torch.float8_e4m3fn, values.shape, -(-2100 // 256))
    error = (restored(codes, scales) - values).abs()
    largest = scales.repeat_interleave(256)[:2100].view(7, 300) * 448
    # an eighth of its power of two for float8's normal numbers, which reach down to 2^-6, and 2^-9 below, of the scale
    assert (error <= torch.maximum(values.abs() / 8, largest / 448 / 512) * 1.001).all()
    assert not restored(*shortened(torch.zeros(3), generator)).any()


def test_steps_too_small_for_bf16_count_on_average():
    """A step of 1e-4 at a weight of 1, where bf16's neighbours are 4e-3 and 8e-3 away."""
    weights = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = LowPrecisionAdamW([weights], OptimizerSettings(lr=1e-4, weight_decay=0.0), seed=0)
    for _ in range(50):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    # the standard error of 4000 weights, each of which is off by at most 8e-3, and five of them
    assert weights.float().mean().item() == pytest.approx(1 - 50e-4, abs=5 * 8e-3 / 4000**0.5)
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(50):
        nearest -= 1e-4
    assert nearest.item() == 1


def test_it_goes_the_way_of_adamw(generator):
    """To the minimum of a quadratic whose curvatures are a hundred times apart, from gradients with noise."""
    start, curvature = torch.randn(512, generator=generator), torch.logspace(-1, 1, 512)
    settings, ends = OptimizerSettings(lr=0.02, weight_decay=0.0), []
    for low in (False, True):
        weights = nn.Parameter(start.to(torch.bfloat16 if low else torch.float32, copy=True))
        optimizer = LowPrecisionAdamW([weights], settings, seed=0) if low else adamw([weights], settings)
        draw = torch.Generator().manual_seed(1)
        for _ in range(300):
            noise = 0.1 * torch.randn(512, generator=draw)
            weights.grad = (curvature * (weights.detach().float() - 2) + noise).to(weights.dtype)
            optimizer.step()
        ends.append(weights.detach().float())
    exact, ours = ends
    assert (start - 2).abs().mean() > 1.5 and (exact - 2).abs().mean() < 0.3
    assert (ours - exact).abs().mean() < 0.05


def test_a_root_that_was_rounded_to_zero_makes_no_great_step():
    """A large gradient, once, leaves a large root beside which the others' are nothing; means forget it sooner."""
    weights = nn.Parameter(torch.zeros(256, dtype=torch.bfloat16))
    optimizer = LowPrecisionAdamW([weights], OptimizerSettings(lr=1e-3, weight_decay=0.0), seed=0)
    for step in range(121):
        weights.grad = torch.full_like(weights, 1e-5 if step < 120 else 0.0)
        weights.grad[0] = 0.0 if step else 1000.0
        before = weights.detach().float().clone()
        optimizer.step()
    state = optimizer.state[weights]
    assert restored(state["exp_avg"], state["exp_avg_scale"])[1:].any() and not state["exp_avg_sq"].float()[1:].any()
    # Adam's own bound, (1 - 0.9) / (1 - 0.999)^0.5 learning rates, and a step between bf16's neighbours below 0.5
    assert ((weights.float() - before).abs() < 1e-3 * 0.1 / 0.001**0.5 + 2**-9).all()


def test_states_and_seeds_decide_the_steps():
    def moved(seed: int, stop: bool = False) -> torch.Tensor:
        weights, draw = nn.Parameter(torch.ones(300, dtype=torch.bfloat16)), torch.Generator().manual_seed(0)
        optimizer = LowPrecisionAdamW([weights], OptimizerSettings(), seed)
        for step in range(4):
            if stop and step == 2:
                state = {name: value.clone() for name, value in optimizer.state[weights].items()}
                optimizer = LowPrecisionAdamW([weights], OptimizerSettings(), seed)
                optimizer.state[weights].update(state)
            weights.grad = torch.randn(300, generator=draw).to(torch.bfloat16)
            optimizer.step()
        return weights.detach()

    assert torch.equal(moved(0), moved(0, stop=True)) and not torch.equal(moved(0), moved(1))
