"""AdamW, fused or not: the same updates, and a checkpoint of one kind goes on as the other."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn

from comfy_tdpo.methods.context import Context
from comfy_tdpo.optimizers import adamw, load_optimizer_tensors, optimizer_tensors
from comfy_tdpo.settings import OptimizerSettings

SETTINGS = OptimizerSettings(lr=0.1, weight_decay=0.1)


def made(fused: bool, one_by_one: bool = False):
    """Parameters by name, and AdamW on them; what CUDA gets is tried on the CPU, where torch has it too."""
    parameters = {name: nn.Parameter(torch.linspace(-1, 1, size)) for name, size in {"a": 3, "b": 5}.items()}
    with patch("comfy_tdpo.optimizers.on_cuda", lambda parameters: fused):
        return parameters, adamw(list(parameters.values()), SETTINGS, one_by_one)


def update(parameters, optimizer, step: int) -> bool:
    """One update whose gradients depend on `step`, those of step 2 infinite, by a training with a scaled loss; whether
    it was skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scale = scaler.scale(torch.ones(()))
    for name, parameter in parameters.items():
        size = float("inf") if step == 2 and name == "b" else scale
        parameter.grad = size * torch.sin(step + torch.arange(1.0, 1 + len(parameter)))
    policy = SimpleNamespace(trainable=SimpleNamespace(sharded=False))
    alone = SimpleNamespace(policy=policy, processes=SimpleNamespace(average=lambda gradients: None))
    return Context.step(alone, optimizer, 1.0, scaler)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)], ids=str)
def test_it_goes_on_as_either_kind(kinds, one_by_one):
    """Five updates, the second skipped by the scaler; after three of them, the state is saved and loaded."""
    (expected, plain), (first, begun) = made(False), made(kinds[0], one_by_one)
    assert begun.defaults["fused"] is (True if kinds[0] else None)
    assert [update(expected, plain, step) for step in range(1, 6)] == [False, True, False, False, False]
    assert [update(first, begun, step) for step in range(1, 4)] == [False, True, False]
    second, resumed = made(kinds[1], one_by_one)
    for name, parameter in second.items():
        parameter.data.copy_(first[name].data)
    load_optimizer_tensors(resumed, second, optimizer_tensors(begun, first))
    assert [update(second, resumed, step) for step in range(4, 6)] == [False, False]
    for name, parameter in second.items():
        # float32 values of about 1, rounded in a few places of each update
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [None, True])
def test_its_count_of_steps_lies_where_its_kind_reads_it(fused):
    """The fused one reads it on the device of the parameters."""
    there = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = adamw([there], SETTINGS)
    optimizer.defaults["fused"] = fused
    saved = {"a:step": torch.tensor(3.0), "a:exp_avg": torch.zeros(2), "a:exp_avg_sq": torch.zeros(2)}
    load_optimizer_tensors(optimizer, {"a": there}, saved)
    places = {moment: value.device.type for moment, value in optimizer.state[there].items()}
    assert places == {"step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
