"""The policy's learning rate over a run, against closed forms, and a run that is made longer when it resumes."""

import math

import pytest
from toy import new_run, toy_training

from comfy_tdpo.optimizers import scheduled_lr
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.trainer.config import override
from comfy_tdpo.trainer.run import RunFolder

LR, UPDATES = 0.01, 12  # of the toy in two epochs: two updates for each of three steps


def by_hand(schedule: str, warmup: int, updates: int) -> list[float]:
    """Of each update, in units of the full rate."""
    rising = [(i + 1) / warmup for i in range(warmup)]
    left = updates - warmup
    falling = {
        "constant": [1.0] * left,
        "linear": [(left - i) / left for i in range(left)],
        "cosine": [math.cos(math.pi * i / left / 2) ** 2 for i in range(left)],  # the half-angle form
    }
    return rising + falling[schedule]


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_their_closed_forms(schedule, warmup):
    settings = PolicySettings(lr=LR, lr_schedule=schedule, warmup_updates=warmup)
    rates = [scheduled_lr(settings, i, UPDATES) for i in range(UPDATES)]
    assert rates == pytest.approx([LR * factor for factor in by_hand(schedule, warmup, UPDATES)], rel=1e-12)  # float64
    assert min(rates) > 0, "no update is wasted"


def test_a_constant_rate_is_the_setting_to_the_last_bit():
    assert scheduled_lr(PolicySettings(lr=1e-4 / 3), 7, 10) == 1e-4 / 3


def recorded_rates(training) -> list[float]:
    rates, optimizer = [], training.context.optimizer
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    return rates


SCHEDULED = {"lr": LR, "lr_schedule": "linear", "warmup_updates": 2}


def test_each_update_has_its_rate_and_the_epoch_reports_its_last(make_policy, tmp_path):
    training = toy_training(new_run(tmp_path / "run", epochs=2, policy=SCHEDULED), make_policy)
    rates = recorded_rates(training)
    metrics = list(training.epochs())
    expected = [LR * factor for factor in by_hand("linear", 2, UPDATES)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [line["policy/lr"] for line in metrics] == [rates[5], rates[11]]
    assert training.method.critic.optimizer.param_groups[0]["lr"] == training.config.critic.lr


def test_a_run_made_longer_follows_the_longer_schedule_from_there(make_policy, tmp_path):
    run = new_run(tmp_path / "run", epochs=2, policy=SCHEDULED)
    short = toy_training(run, make_policy)
    rates = recorded_rates(short)
    list(short.epochs())
    run.write_config(override(run.config, {"epochs": 3}))
    longer = toy_training(RunFolder.open(run.path), make_policy)
    later = recorded_rates(longer)
    list(longer.epochs())
    assert rates == pytest.approx([LR * factor for factor in by_hand("linear", 2, 12)], rel=1e-12)
    assert later == pytest.approx([LR * factor for factor in by_hand("linear", 2, 18)[12:]], rel=1e-12)


def test_a_constant_rate_is_no_metric(make_policy, tmp_path):
    (metrics,) = toy_training(new_run(tmp_path / "run", epochs=1), make_policy).epochs()
    assert "policy/lr" not in metrics


@pytest.mark.parametrize(("warmup", "fits"), [(11, True), (12, False), (500, False)])
def test_a_warm_up_is_shorter_than_its_run(warmup, fits, make_policy, tmp_path):
    run = new_run(tmp_path / "run", epochs=2, policy={"warmup_updates": warmup})
    if fits:
        toy_training(run, make_policy)
    else:
        with pytest.raises(ValueError, match=f"policy.warmup_updates {warmup} for a run of 12 updates; expected fewer"):
            toy_training(run, make_policy)
