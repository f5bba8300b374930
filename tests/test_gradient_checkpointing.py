"""Gradient checkpointing: the same gradients, from activations that are computed again instead of kept."""

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from toy import Brightness, new_run

from comfy_tdpo.trainer.training import Training

SETTINGS = {"samples_per_epoch": 4, "samples_per_update": 4, "micro_batch": 4}
VARIANTS = {
    "tdpo-r": {},
    "with a KL penalty, whose reference is the same network": {"kl": {"coefficient": 0.5}},
    "ddpo-2": {"algorithm": "ddpo-2"},
}


def gradients_of_an_update(path, make_policy, checkpointing: bool, count: list | None = None, **settings):
    """Of the first update of a policy that has drifted; `count` takes in an entry for each forward of a block."""
    run = new_run(path, policy={"gradient_checkpointing": checkpointing}, **SETTINGS, **settings)
    config = run.config
    policy = make_policy(steps=config.steps, trained=True, gradient_checkpointing=config.policy.gradient_checkpointing)
    training = Training(config, policy, Brightness(), {}, run, Accelerator(cpu=True))
    training._sample()
    if count is not None:
        for module in policy.model.network.modules():
            if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
                module.register_forward_pre_hook(lambda *_: count.append(1))
    progress = training.context.progress
    training.method.update_policy(progress.batch(), progress.targets, *training.method.groups(1)[0])
    return [parameter.grad for parameter in policy.parameters]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_without_it(variant, tmp_path, make_policy):
    plain, checkpointed = (
        gradients_of_an_update(tmp_path / str(on), make_policy, on, **VARIANTS[variant]) for on in (False, True)
    )
    assert torch.cat([gradient.flatten() for gradient in plain]).norm() > 0.01
    # the same operations on the same rows; only the order in which gradients of one tensor add up is free
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)


def test_it_is_in_effect_though_the_network_is_in_eval_mode(tmp_path, make_policy):
    forwards = {on: [] for on in (False, True)}
    for on, count in forwards.items():
        gradients_of_an_update(tmp_path / str(on), make_policy, on, count)
    # the blocks before the first adapter have nothing to compute again
    assert 1.5 * len(forwards[False]) < len(forwards[True]) <= 2 * len(forwards[False])
