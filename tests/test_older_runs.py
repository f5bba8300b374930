"""Runs outlive versions: one of 0.1.0 goes on as it would have then, and what a saved run lacks takes its default."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from toy import timeless, toy_config

from comfy_tdpo.methods import ALGORITHMS, critic
from comfy_tdpo.trainer.assemble import assemble
from comfy_tdpo.trainer.config import config_class, leaf_fields, plain_values, validate
from comfy_tdpo.trainer.config.changes import differences
from comfy_tdpo.trainer.config.toml_files import read_toml
from comfy_tdpo.trainer.run import RunFolder

OLD = Path(__file__).parent / "golden" / "run-0.1.0"  # see its make.py
NARROW = (8, 8, 4, 4)  # the critic's widths there


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> RunFolder:
    """A run of version 0.1.0, stopped in the middle of its second epoch of three."""
    monkeypatch.setitem(critic.ARCHITECTURES, "authors", replace(critic.ARCHITECTURES["authors"], widths=NARROW))
    return RunFolder.open(Path(shutil.copytree(OLD / "stopped", tmp_path / "run")))


def train_on(run: RunFolder) -> None:
    list(assemble(run.config, run, cpu=True).epochs())


# --- version 0.1.0


@pytest.mark.parametrize("left", ["in mid-epoch", "at the end of an epoch"])
def test_a_run_of_0_1_0_goes_on_as_it_would_have_then(left, old_run):
    """To the last bit on the machine that made it."""
    if left == "at the end of an epoch":
        shutil.rmtree(old_run.checkpoints / "epoch-0001-samples-000004-updates-000002")
    train_on(old_run)
    now, then = timeless(old_run.metrics()), timeless(RunFolder(OLD / "continued").metrics())
    assert [line["epoch"] for line in now] == [1, 2, 3] and now[0] == then[0]
    for line, expected in zip(now[1:], then[1:], strict=True):
        # other CPUs round float32 otherwise, by 1e-7 or so, and the loss is a difference of terms of size 1
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)
    lora, expected = load_file(old_run.latest_lora), load_file(OLD / "continued" / "lora" / "latest.safetensors")
    # steps of 5e-4 that rounding moves by a small part of theirs
    torch.testing.assert_close(lora, expected, rtol=0, atol=1e-5)


def test_the_updates_since_count(old_run):
    """What the tolerance above leaves out: the LoRA moved by far more after the checkpoint."""
    saved = load_file(old_run.checkpoints / "epoch-0001-samples-000004-updates-000002" / "policy.safetensors")
    train_on(old_run)
    trained = load_file(old_run.checkpoints / "epoch-0003" / "policy.safetensors")
    assert max((trained[name] - saved[name]).abs().max() for name in saved) > 5e-4


def test_another_model_is_refused_for_a_run_of_0_1_0_too(old_run):
    training = assemble(old_run.config, old_run, cpu=True)
    next(weight for _, weight in training.policy.frozen_weights()).flatten()[0] += 1
    with pytest.raises(ValueError, match="a different model"):
        list(training.epochs())


# --- settings that only one of two versions has


def edit(run: RunFolder, change) -> None:
    """Have `change` edit the settings in config.toml and in the newest checkpoint."""
    values = read_toml(run.path / "config.toml")
    change(values)
    (run.path / "config.toml").write_text(tomli_w.dumps(values))
    edit_saved(run, lambda state: change(state["identity"]["settings"]))


def edit_saved(run: RunFolder, change) -> None:
    """Have `change` edit the newest checkpoint's state."""
    path = max(run.checkpoints.iterdir())
    before = (path / "state.json").read_bytes()
    state = json.loads(before)
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    old, new = (hashlib.sha256(text).hexdigest() for text in (before, (path / "state.json").read_bytes()))
    sums = path / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, new))


def without(values: dict, name: str) -> None:
    """Take the setting of a dotted name, where it is there, out of nested values."""
    *sections, last = name.split(".")
    for section in sections:
        values = values.get(section, {})
    values.pop(last, None)


def value_of(values: dict, name: str):
    """The setting of a dotted name in nested values, None where it is not there."""
    *sections, last = name.split(".")
    for section in sections:
        values = values[section]
    return values.get(last)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_setting_that_a_run_lacks_has_its_default(algorithm):
    default = config_class(algorithm)(algorithm=algorithm)
    for name, _ in leaf_fields(algorithm):
        if name == "algorithm":
            continue  # says which settings there are
        older = plain_values(default)
        without(older, name)
        assert validate(older) == default, name
        assert differences(plain_values(default), older) == {}, name


def test_a_setting_that_a_run_lacks_and_that_is_not_at_its_default_is_another():
    older = plain_values(toy_config())
    without(older, "gamma")
    now = plain_values(toy_config(gamma=0.9))
    assert differences(now, older) == {"gamma": (1.0, 0.9)}


def test_a_run_that_lacks_whatever_is_at_its_default_goes_on(old_run):
    defaults = plain_values(config_class("tdpo-r")())
    values = plain_values(old_run.config)
    lacking = [name for name, _ in leaf_fields("tdpo-r") if value_of(values, name) == value_of(defaults, name)]
    assert {"gamma", "policy.alpha", "kl.coefficient", "algorithm"} <= set(lacking)
    for name in lacking:
        edit(old_run, lambda found, name=name: without(found, name))
    train_on(old_run)
    now, then = timeless(old_run.metrics()), timeless(RunFolder(OLD / "continued").metrics())
    for line, expected in zip(now, then, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)  # as above


@pytest.mark.parametrize("name", ["temperature", "policy.temperature", "neurons.temperature"])
def test_a_setting_of_a_newer_version_is_named(name, old_run):
    def add(values):
        *sections, last = name.split(".")
        for section in sections:
            values = values[section]
        values[last] = 1.0

    edit_saved(old_run, lambda state: add(state["identity"]["settings"]) or state["identity"].update(version="9.8.7"))
    with pytest.raises(ValueError, match=rf"'{name}'.*9\.8\.7"):
        train_on(old_run)
    edit(old_run, add)
    config = old_run.path / "config.toml"
    config.write_text("# comfy_tdpo 9.8.7\n" + config.read_text())
    with pytest.raises(ValueError, match=f"{name}.*9.8.7"):
        train_on(old_run)
