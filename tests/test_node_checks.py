"""A run that could not start is refused before it has a folder."""

import pytest
from conftest import SD1_SCHEDULE
from diffusers import DDIMScheduler
from fake_training import wanted
from toy import new_run, toy_training

from comfy_tdpo.methods import ALGORITHMS
from comfy_tdpo.models.kind import SD
from comfy_tdpo.nodes.runs.checks import check_run
from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
from comfy_tdpo.trainer.config import override

JPEG = RewardChoice({"jpeg-compressibility": 1.0})


DIRECT = {"alignprop", "draft", "refl"}


def ask(words=("a red circle",), schedule=SD1_SCHEDULE, **changes) -> None:
    check_run(wanted(**changes).config(), list(words), DDIMScheduler(**schedule), "ddim", factor=8)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS.keys() - DIRECT))
def test_what_can_start_is_let_through(algorithm):
    for reward in ("shapes-aesthetic", "shapes-gold", "jpeg-incompressibility"):
        ask(algorithm=algorithm, reward=RewardChoice({reward: 1.0}), settings="samples_per_prompt = 2")


@pytest.mark.parametrize("algorithm", sorted(DIRECT))
def test_what_has_a_gradient_is_let_through_for_algorithms_that_need_one(algorithm):
    ask(algorithm=algorithm)
    with pytest.raises(ValueError, match="got reward 'jpeg-compressibility', which has no gradient, for algorithm"):
        ask(algorithm=algorithm, reward=JPEG)


def test_a_taste_is_let_through(tmp_path):
    """It is made of files that only the training reads."""
    taste = RewardChoice({"taste:mine": 1.0}, {"taste:mine": str(tmp_path)})
    ask(reward=taste)
    ask(held_out=taste)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": "output.trackers = ['abacus']"}, "got tracker 'abacus'"),
        (
            {"settings": "output.recommend = true", "preset": SD, "reward": JPEG},
            "got a run that watches no held-out reward",
        ),
        ({"reward": RewardChoice({"shapes-gold": 1.0}), "words": ["a cat"]}, "shapes-gold can only judge prompts of"),
        ({"held_out": RewardChoice({"shapes-gold": 1.0}), "words": ["a cat"]}, "shapes-gold can only judge prompts of"),
        (
            {"reward": RewardChoice({"jpeg-compressibility": 1.0}, {"jpeg-compressibility": "/a/b.pt"})},
            "as the weights of reward 'jpeg-compressibility', which has none",
        ),
        (
            {"reward": JPEG, "settings": "favour_diversity = true\nsamples_per_prompt = 2"},
            "got favour_diversity with reward 'jpeg-compressibility', which has no image encoder",
        ),
        ({"numbers": {"resolution": 20}}, "got resolution 20; expected a positive multiple of 8"),
        ({"settings": "eval_resolution = 20"}, "got eval_resolution 20; expected a positive multiple of 8"),
        ({"settings": "eval_steps = 1000"}, "start beyond the 1000 timesteps"),
        ({"numbers": {"steps": 1000}}, "start beyond the 1000 timesteps"),
        ({"settings": "process = 'walk'"}, "got process 'walk'"),
        ({"settings": "policy.warmup_updates = 10000"}, "got policy.warmup_updates 10000 for a run of 40 updates"),
        (
            {"schedule": SD1_SCHEDULE | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}},
            "got prediction_type epsilon on a schedule with zero terminal SNR",
        ),
    ],
)
def test_what_could_not_start_is_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        ask(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "policy"),
    [(name, {"train_share": share}) for name in ("tdpo-r", "ddpo-2", "sdpo") for share in (1.0, 0.5)]
    + [("alignprop", {})],
)
def test_the_updates_of_a_run_are_those_that_a_training_makes(algorithm, policy, make_policy, tmp_path):
    """The last warm-up that the training accepts, and the first one that it refuses."""
    run = new_run(tmp_path / "run", algorithm=algorithm, policy=policy)
    training = toy_training(run, make_policy)
    updates = run.config.epochs * len(training.method.groups(1))
    scheduler, rest = (
        training.policy.model.scheduler,
        (training.policy.model.process, training.policy.model.decode.factor),
    )
    for warmup, refused in ((updates - 1, False), (updates, True)):
        config = override(run.config, {"policy": {"warmup_updates": warmup}})
        if refused:
            with pytest.raises(ValueError, match=f"for a run of {updates} updates"):
                check_run(config, training.prompts, scheduler, *rest)
        else:
            check_run(config, training.prompts, scheduler, *rest)
