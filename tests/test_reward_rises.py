"""The reward rises: every algorithm brightens the images of a model that has little else to learn."""

import pytest
import torch
from accelerate import Accelerator
from tint import TintModel
from torch import Tensor
from toy import Brightness, new_run

from comfy_tdpo.methods import ALGORITHMS, settings_class
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rollout import draw_images
from comfy_tdpo.trainer.training import Training

SETTINGS = {
    "epochs": 8,
    "samples_per_epoch": 512,
    "samples_per_update": 256,
    "micro_batch": 256,
    "decode_batch": 512,
    "guidance": 1.0,
    "resolution": 8,
    "policy": {"lr": 5e-3, "eps": 1e-4, "clip_range": 1e-3, "rank": 4, "targets": "attention"},
    "output": {"grid_images": 1, "samples_every": 100, "checkpoint_every": 100},
}

# What the reward must rise by. Measured here, and with policy_loss negated, with the ratio's inverse in its place, and
# without the optimizer's step (a ratio without a gradient ends in an error):
#              today  negated  inverse  frozen
#   tdpo-r       6.4     -2.9     -6.0     0.0
#   tdpo         6.4     -2.9     -6.0     0.0
#   ddpo-2       2.0     -5.3     -2.3     0.0
#   ddpo-100     3.6     -6.8     -4.0     0.0
#   dpok         4.2     -1.9     -4.2     0.0
#   grpo         3.9     -6.1     -3.9     0.0
#   sdpo         6.9     -6.6     -7.0     0.0   (pair_loss, and its log-ratios)
# Seeds 1 to 3 give 3.6 to 5.1, 3.6 to 5.1, 0.6 to 1.6, 2.4 to 4.1, 2.0 to 4.1, 0.7 to 2.8 and 2.8 to 5.9.
MARGIN = 0.5


def scores(training: Training) -> Tensor:
    """Of the images of 256 fixed noises, so that two policies' differ by what was learned alone."""
    prompts, seeds = training.prompts[:1] * 256, [("fixed", i) for i in range(256)]
    with torch.no_grad():
        return training.context.reward.score(draw_images(training.context.decoder, prompts, seeds, 256), prompts)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_reward_rises(algorithm, tmp_path):
    """In standard deviations of an untrained model's scores."""
    settings = SETTINGS
    if settings_class(algorithm).needs_gradient:  # of the reward itself, which is larger than AdamW's epsilon
        settings = SETTINGS | {"policy": {"lr": 5e-3}, "loss_weight": 1.0}
    run = new_run(tmp_path / "run", algorithm=algorithm, **settings)
    config = run.config
    how = {name: getattr(config, name) for name in ("steps", "guidance", "resolution", "seed")}
    policy = DiffusionPolicy(TintModel(), settings=config.policy, **how)
    training = Training(config, policy, Brightness(), {}, run, Accelerator(cpu=True))
    before = scores(training)
    list(training.epochs())
    rise = ((scores(training) - before).mean() / before.std()).item()
    assert rise > MARGIN
