"""Convolutions with their channels last: where it pays, and without an effect on results but for rounding."""

import pytest
import torch

from comfy_tdpo.models import adapt
from comfy_tdpo.rollout import denoise, draw_noise
from comfy_tdpo.trainer.run.identity import _digest_of_weights


def wide(policy) -> dict[str, torch.nn.Conv2d]:
    """Its convolutions in which the two orders of memory differ."""
    networks = policy.model.networks
    layers = {f"{name}.{path}": layer for name in networks for path, layer in networks[name].named_modules()}
    convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, torch.nn.Conv2d)}
    return {name: layer for name, layer in convolutions.items() if layer.kernel_size != (1, 1)}


def test_frozen_convolutions_have_their_channels_last_where_it_pays(make_policy, monkeypatch):
    """It is said to pay here, since there is no GPU."""
    here = {"steps": 2, "guidance": 1.0, "dtype": torch.bfloat16, "autocast": torch.bfloat16, "trained": True}
    plain = make_policy(**here)
    monkeypatch.setattr(adapt, "channels_last_pays", lambda weight: weight.dtype == torch.bfloat16)
    policy = make_policy(**here)
    assert wide(policy) and all(layer.weight.is_contiguous() for layer in wide(plain).values())
    for name, layer in wide(policy).items():
        assert layer.weight.is_contiguous(memory_format=torch.channels_last), name
    assert _digest_of_weights(policy) == _digest_of_weights(plain), "a run resumes on another machine"
    noise = draw_noise(plain, [("test", 0)])
    with torch.no_grad():
        a, b = (denoise(one, ["a cat"], noise).latents[:, -1] for one in (plain, policy))
    # bf16 has 8 bits of mantissa; the sums of other kernels differ in the last of them
    torch.testing.assert_close(a, b, rtol=0, atol=0.05 * a.abs().max().item())


def test_trained_weights_stay_in_the_order_in_which_they_are_saved(make_policy, monkeypatch):
    monkeypatch.setattr(adapt, "channels_last_pays", lambda weight: True)
    policy = make_policy(train="full")
    orders = {name.split(".")[0]: layer.weight.is_contiguous() for name, layer in wide(policy).items()}
    assert orders == {"unet": True, "vae": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_does_not_pay_on_the_cpu(dtype):
    assert not adapt.channels_last_pays(torch.zeros(1, dtype=dtype))
