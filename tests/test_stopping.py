"""A run that overoptimises: what it keeps and says, how it ends, and how it resumes.

The held-out reward here is the training reward with its sign turned, so that it falls exactly when the other rises, and
the rule's thresholds are next to nothing.
"""

import logging
import threading

import pytest
import torch
from accelerate import Accelerator
from test_resume import Steps, StopAt
from toy import Brightness, lora_of, new_run, same, timeless

from comfy_tdpo.diversity import diversity
from comfy_tdpo.trainer import __main__ as command_line
from comfy_tdpo.trainer.alarm import alarm_of, ends_early, lora_before
from comfy_tdpo.trainer.config import make_config, override
from comfy_tdpo.trainer.job import Job
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.terminal.summary import summary
from comfy_tdpo.trainer.training import Training

WATCHED = "shapes-match"
RULE = {"reward": WATCHED, "window": 1, "standard_errors": 1e-3, "fall": 0.0}
EPOCHS = 5


class Darkness(Brightness):
    name = WATCHED

    def score(self, images, prompts):
        return -super().score(images, prompts)


def start(run: RunFolder, make_policy, stop=None, watch=lambda phase, done, total: None) -> Training:
    config = run.config
    policy = make_policy(steps=config.steps, guidance=config.guidance, seed=config.seed)
    rewards = {WATCHED: Darkness()}
    return Training(config, policy, Brightness(), rewards, run, Accelerator(cpu=True), stop, watch)


def new(path, **overrides) -> RunFolder:
    settings = {"epochs": EPOCHS, "overoptimisation": RULE, "output": {"samples_every": 9, "grid_images": 2}}
    return new_run(path, **(settings | overrides))


def snapshots(run: RunFolder) -> list[str]:
    return sorted(path.stem for path in run.latest_lora.parent.iterdir())


@pytest.fixture(scope="module")
def warned(tmp_path_factory, make_policy):
    """A run that overoptimises and trains on, and what was logged."""
    run, lines = new(tmp_path_factory.mktemp("warned") / "run"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("comfy_tdpo").addHandler(handler)
    try:
        list(start(run, make_policy).epochs())
    finally:
        logging.getLogger("comfy_tdpo").removeHandler(handler)
    return run, [line for line in lines if "veroptimis" in line]


def first_rise(run: RunFolder) -> int:
    """The first epoch whose training reward is above an earlier epoch's."""
    means = [line["reward/brightness/mean"] for line in run.metrics()]
    return next(e + 1 for e in range(1, len(means)) if means[e] > min(means[:e]))


def test_it_rings_when_the_held_out_reward_falls_and_warns_once(warned):
    run, lines = warned
    alarm = alarm_of(run.metrics())
    assert alarm.epoch == first_rise(run) < EPOCHS == len(run.metrics())
    (line,) = lines
    assert line.startswith(
        f"Overoptimisation since epoch {alarm.since}: brightness rose while the held-out {WATCHED} fell"
    )
    assert line in " ".join(summary(run).split())
    rung = [line["epoch"] for line in run.metrics() if "overoptimisation/since" in line]
    assert rung == list(range(alarm.epoch, EPOCHS + 1))


def test_the_metrics_have_spread_and_diversity(warned):
    line = warned[0].metrics()[0]
    assert line[f"eval/{WATCHED}/std"] == pytest.approx(line["reward/brightness/std"], rel=1e-5)
    assert 0 <= line["diversity"] <= 2


def test_diversity_is_that_of_the_epochs_samples(tmp_path, make_policy):
    run = new(tmp_path / "run", epochs=1)
    training, seen = start(run, make_policy), []
    sample = training.method.sample
    training.method.sample = lambda *args: seen.append(sample(*args)) or seen[-1]
    (line,) = training.epochs()
    embeds, prompts = torch.cat([part.final_embeds for part in seen]), [p for part in seen for p in part.prompts]
    assert len(prompts) == 8 and line.get("diversity") == diversity(embeds, prompts)


def test_the_last_lora_from_before_is_kept_and_others_are_not(tmp_path, make_policy, monkeypatch):
    """The rule is told when to ring: after epoch 6, where the epochs up to 4 were best. Epoch 3's LoRA drew epoch 4."""
    from comfy_tdpo.trainer import overoptimisation
    from comfy_tdpo.trainer.overoptimisation import Fall

    falls = {4: Fall(2, 0.0, 0.0), 5: Fall(3, 0.0, 0.0), 6: Fall(3, 1.0, 9.0)}
    monkeypatch.setattr(overoptimisation, "largest_fall", lambda levels, training, window: falls.get(len(training)))
    run = new(tmp_path / "run", epochs=8, overoptimisation={"reward": WATCHED, "window": 1})
    kept = [snapshots(run) for _ in start(run, make_policy).epochs()]
    assert kept[2] == ["epoch-0002", "epoch-0003", "latest"]
    assert kept[3] == ["epoch-0002", "epoch-0003", "epoch-0004", "latest"]
    assert kept[4] == ["epoch-0003", "epoch-0004", "epoch-0005", "latest"]
    assert kept[5] == kept[6] == ["epoch-0003", "latest"]
    assert kept[7] == ["epoch-0003", "epoch-0008", "latest"]
    alarm = alarm_of(run.metrics())
    assert (alarm.epoch, alarm.since) == (6, 5) and lora_before(run, alarm.since) == run.lora(3)


def test_without_a_watched_reward_no_further_lora_is_kept(tmp_path, make_policy):
    run = new(tmp_path / "run", overoptimisation={"reward": "none"}, epochs=2)
    list(start(run, make_policy).epochs())
    assert snapshots(run) == ["epoch-0002", "latest"]
    assert not any("overoptimisation" in key for line in run.metrics() for key in line)


# --- ending


def test_it_ends_when_asked_to_and_does_not_go_on_untold(tmp_path, make_policy, warned):
    run = new(tmp_path / "run", stop_on_overoptimisation=True)
    training = start(run, make_policy)
    list(training.epochs())
    metrics, rang = timeless(run.metrics()), alarm_of(warned[0].metrics()).epoch
    assert not training.stopped and metrics == timeless(warned[0].metrics())[:rang]
    assert run.sample_grid(rang).exists() and run.lora(rang).exists() and ends_early(run.metrics(), run.config)
    assert list(start(RunFolder.open(run.path), make_policy).epochs()) == []
    assert timeless(run.metrics()) == metrics
    run.write_config(override(run.config, {"stop_on_overoptimisation": False}))
    list(start(RunFolder.open(run.path), make_policy).epochs())
    assert timeless(run.metrics()) == timeless(warned[0].metrics())


def test_stopped_in_mid_epoch_and_resumed_it_is_the_same_run(tmp_path, make_policy):
    whole, steps = new(tmp_path / "whole"), Steps()
    reference = start(whole, make_policy, watch=steps)
    list(reference.epochs())
    alarm = alarm_of(whole.metrics())
    assert alarm.epoch < EPOCHS and lora_before(whole, alarm.since), "what is resumed includes the alarm and its LoRA"
    for step in range(6, steps.count, 28):  # in epochs 1 and 4
        run, stop = new(tmp_path / f"stopped-{step}"), threading.Event()
        list(start(run, make_policy, stop, StopAt(stop, step)).epochs())
        again = start(RunFolder.open(run.path), make_policy)
        list(again.epochs())
        assert timeless(run.metrics()) == timeless(whole.metrics()), f"stopped at step {step}"
        assert same(lora_of(again), lora_of(reference)) and snapshots(run) == snapshots(whole)


def test_a_job_says_that_it_overoptimises(tmp_path, make_policy, warned):
    alarm = alarm_of(warned[0].metrics())
    job, told = Job(new(tmp_path / "run"), lambda run, stop, watch: start(run, make_policy, stop, watch)), {}
    job.subscribe(
        lambda event, status: told.__setitem__(status.epoch, status.overoptimised) if event == "epoch" else None
    )
    job.start()
    assert job.wait(120).state == "finished"
    assert told == {epoch: alarm.since if epoch >= alarm.epoch else None for epoch in range(1, EPOCHS + 1)}
    assert Job(job.run, lambda *_: None).status.overoptimised == alarm.since


def test_the_command_line_ends_with_success_and_says_how_to_train_on(tmp_path, make_policy, capsys):
    run = new(tmp_path / "run", stop_on_overoptimisation=True)
    list(start(run, make_policy).epochs())
    assert command_line._conclude(run, stopped=False) == 0
    text = capsys.readouterr().out
    assert "Overoptimisation since epoch" in text
    assert text.rstrip().endswith(f"--resume {run.path} --stop-on-overoptimisation false")


# --- settings


def test_the_watched_reward_is_measured_and_never_trained_on():
    config = make_config(overrides={"overoptimisation": {"reward": WATCHED}, "eval_rewards": ["shapes-judge"]})
    assert config.measured == ["shapes-judge", WATCHED]
    with pytest.raises(ValueError, match=f"overoptimisation.reward is '{WATCHED}', which is trained on; choose a diff"):
        make_config(overrides={"overoptimisation": {"reward": WATCHED}, "rewards": {WATCHED: 1.0}})
    with pytest.raises(ValueError, match="no reward is watched; set overoptimisation.reward"):
        make_config(overrides={"stop_on_overoptimisation": True, "overoptimisation": {"reward": "none"}})
    with pytest.raises(ValueError, match="got reward 'nobody'"):
        make_config(overrides={"overoptimisation": {"reward": "nobody"}})


def test_a_presets_watched_reward_gives_way_to_training_on_it(monkeypatch):
    from comfy_tdpo.trainer.config import layers

    read = layers.read_toml
    monkeypatch.setattr(layers, "read_toml", lambda path: read(path) | {"overoptimisation": {"reward": WATCHED}})
    assert make_config("shapes").overoptimisation.reward == WATCHED
    assert make_config("shapes", None, {"rewards": {WATCHED: 1.0}}).overoptimisation.reward is None


def test_a_switch_alone_on_the_command_line_turns_it_on():
    from comfy_tdpo.trainer.terminal.arguments import overrides, parse

    def given(*flags: str):
        return make_config(overrides=overrides(parse(["--overoptimisation.reward", WATCHED, *flags])))

    assert given("--stop-on-overoptimisation", "--seed", "3").stop_on_overoptimisation is True
    assert given("--stop-on-overoptimisation", "false").stop_on_overoptimisation is False
    assert given().stop_on_overoptimisation is False
