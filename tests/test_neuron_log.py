"""Each neuron's record in the run's folder, and the plots and texts made from it."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from toy import Brightness, new_run, toy_training

from comfy_tdpo.trainer.plots.neurons import described, neuron_figure
from comfy_tdpo.trainer.run.neuron_log import (
    NEURONS,
    POLICY_NEURONS,
    append_neurons,
    append_policy_neurons,
    read_neurons,
    read_policy_neurons,
)
from comfy_tdpo.trainer.training import Training


def train(run, make_policy, stop=None):
    config = run.config
    policy = make_policy(steps=config.steps, guidance=config.guidance, seed=config.seed)
    accelerator = Accelerator(cpu=True, project_dir=str(run.path))
    training = Training(config, policy, Brightness(), {}, run, accelerator, stop)
    list(training.epochs())
    return training


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_policy):
    """A finished run, to look at only."""
    run = new_run(tmp_path_factory.mktemp("neurons") / "run")
    train(run, make_policy)
    return run


def test_the_record_agrees_with_the_metrics(run):
    metrics, records = run.metrics(), read_neurons(run.path, 3)
    assert [record.epoch for record in records] == [1, 2, 3]
    for line, record in zip(metrics, records, strict=True):
        scores = np.concatenate([record.scores[layer] for layer in record.scores])
        assert len(scores) == 1024 + 128 + 64 + 16
        # scores are rounded to four digits, so that a few tiny ones read 0
        assert 100 * (scores <= 0).mean() == pytest.approx(line["neurons/dormant_percent"], abs=1)
        assert record.reset_count == line["neurons/reset_count"]
        for layer in record.scores.values():
            assert np.mean(layer) == pytest.approx(1, abs=1e-3), "relative to the layer's mean"
    assert records[1].reset_count > 0 and records[0].reset == {}, "a reset every second epoch"


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_the_policys_record_agrees_with_the_metrics_layer_by_layer(tmp_path, make_policy, trains):
    neurons = {"policy_reset": "dormant", "policy_threshold": 0.5, "every": 2}
    run = new_run(tmp_path / "run", policy={"train": trains}, neurons=neurons)
    list(toy_training(run, make_policy).epochs())
    records = read_policy_neurons(run.path, 3)
    assert [record.epoch for record in records] == [1, 2, 3]
    for line, record in zip(run.metrics(), records, strict=True):
        assert record.count.keys() == record.dormant.keys() and len(record.count) > 1
        share = 100 * sum(record.dormant.values()) / sum(record.count.values())
        assert share == pytest.approx(line["policy_neurons/dormant_percent"], abs=1e-4)  # float32
        assert sum(record.reset.values()) == line["policy_neurons/reset_count"]
    assert records[1].reset == records[1].dormant and sum(records[1].reset.values()) > 0
    assert records[0].reset == records[2].reset == {}, "a reset every second epoch"


def test_a_policy_that_is_not_measured_has_no_record(run):
    assert not (run.path / POLICY_NEURONS).exists()


def test_the_policys_epoch_that_ran_twice_counts_as_it_ran_last(tmp_path):
    for active in (True, False):
        append_policy_neurons(tmp_path, 1, {"ff": torch.tensor([True, active])}, {})
    (record,) = read_policy_neurons(tmp_path, 1)
    assert (record.count, record.dormant, record.reset) == ({"ff": 2}, {"ff": 1}, {})


def test_an_epoch_that_ran_twice_counts_as_it_ran_last(tmp_path):
    for epoch, value in ((1, 1.0), (2, 2.0), (3, 9.0), (2, 4.0)):
        append_neurons(tmp_path, epoch, {"layers.0": torch.full((2,), value)}, {})
    with (tmp_path / NEURONS).open("a") as file:
        file.write('{"epoch": 3, "sco')
    assert [(record.epoch, record.scores["layers.0"][0]) for record in read_neurons(tmp_path, 2)] == [
        (1, 1.0),
        (2, 4.0),
    ]


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    (tmp_path / NEURONS).write_text('{"epoch": 1, "sco\n')
    append_neurons(tmp_path, 1, {"layers.0": torch.ones(2)}, {"layers.0": torch.tensor([False, True])})
    (record,) = read_neurons(tmp_path, 5)
    assert record.reset == {"layers.0": [1]}


def test_the_picture_shows_activation_and_resets(run):
    picture = np.asarray(neuron_figure(run)).astype(int)
    assert picture.shape[1] == 1600
    orange = (abs(picture - np.array([213, 94, 0])) < 3).all(-1)
    columns = orange[150:600].any(0).nonzero()[0]  # of the first layer
    width = 1600 * (8 - 0.95 - 0.95) / 8
    middle = 1600 * 0.95 / 8 + width * 1.875 / 3  # the end of the second of three epochs
    assert abs(columns.mean() - middle) < 0.02 * width
    scores = np.array([record.scores["layers.0"] for record in read_neurons(run.path, 3)])
    share = (scores > 0.8 * 3).mean() * width / 1600  # at 0.8 of the brightest the colour is as dark as this
    # resets and the edges of the picture hide some
    assert (picture[150:600].sum(-1) < 300).mean() == pytest.approx(share, rel=0.25)


def test_the_words(run):
    first, *epochs = described(run).splitlines()
    assert first == "run: 1232 neurons in the critic; active neurons are reset every 2 epochs"
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 2", "epoch 3"]
    assert "reset" in epochs[1] and "reset" not in epochs[0]
    assert "overlap with the epoch before" in epochs[2]


def test_a_run_without_a_record_says_why(tmp_path, make_policy):
    with pytest.raises(ValueError, match="run 'new' has no record of neurons: no epoch has finished"):
        neuron_figure(new_run(tmp_path / "new"))
    run = new_run(tmp_path / "ddpo", algorithm="ddpo-100", epochs=1, samples_per_update=8)
    train(run, make_policy)
    with pytest.raises(ValueError, match="no critic; expected a run of one of tdpo-g, tdpo-r, tdpo, dpok"):
        described(run)


def test_a_missing_epoch_leaves_its_column_empty(tmp_path):
    run = new_run(tmp_path / "run")
    for epoch in (1, 2, 3):
        if epoch != 2:
            append_neurons(run.path, epoch, {"layers.0": torch.ones(8)}, {})
        run.append_metrics({"epoch": epoch, "neurons/dormant_percent": 0.0, "neurons/reset_count": 0})
    picture = np.asarray(neuron_figure(run))
    row = picture[150 + 30, :, :].astype(int).sum(-1)
    left = int(1600 * 0.95 / 8)
    width = int(1600 * (8 - 1.9) / 8)
    assert row[left + width // 6] < 700 and row[left + width * 5 // 6] < 700
    assert row[left + width // 2] == 765
