"""`plan`: the steps of a run, read from the model's configurations alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import SHIPPED

from comfy_tdpo.methods.window import window
from comfy_tdpo.models import diffusers_folder, flux_file, outline, sd3_file
from comfy_tdpo.models.sizes import is_countable
from comfy_tdpo.process import make_process
from comfy_tdpo.process.flow_schedule import DynamicShift, FlowSchedule
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.assemble import model_source
from comfy_tdpo.trainer.config import make_config, presets
from comfy_tdpo.trainer.terminal.plan import SENSITIVE, plan

FLOW_PRESETS = {
    "sd3": FlowSchedule(3.0),
    "flux-dev": FlowSchedule(DynamicShift()),
    "flux-schnell": FlowSchedule(),
    "z-image": FlowSchedule(6.0),
    "z-image-turbo": FlowSchedule(3.0),
}


def index_of(classes: dict[str, Any]) -> dict[str, list[str]]:
    """What model_index.json says of a model's components, given their classes."""
    return {name: [cls.__module__.partition(".")[0], cls.__name__] for name, cls in classes.items()}


@pytest.fixture
def sd3(tmp_path) -> Path:
    """The configurations of Stable Diffusion 3's folder that a plan needs, without weights."""
    files = {
        "model_index.json": index_of(sd3_file.LAYOUT.classes),
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        "vae/config.json": {"block_out_channels": [128, 256, 512, 512]},
    }
    for name, values in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    return tmp_path


def rows(text: str) -> list[list[str]]:
    """The lines of the table, one list of words each."""
    table = text.split("\n\n")[1].splitlines()
    assert table[0].split() == ["step", "time", "sigma", "sensitivity", "trained"]
    return [line.split() for line in table[1:]]


def test_a_plan_of_sd3(sd3, capsys):
    """By hand, for the first and the last: t = 1, s = 0.964: x_s has (1 - s) / s of its noise of the output."""
    assert main(["plan", "--model", str(sd3), "--algorithm", "tdpo-r"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{sd3} by tdpo-r: 10 steps of flow-ddim, guidance 4.5\n")
    table = rows(text)
    assert table[0] == ["1", "1000.0", "0.9643", "0.04", "yes"]
    assert table[9] == ["10", "250.0", "0.0000", "-", "no"] and [row[4] for row in table[:9]] == ["yes"] * 9
    assert "drowns" not in text


def test_a_plan_of_flux_dev_has_noise_levels_by_the_size_of_the_image(sd3, capsys):
    """By hand: 1,024 tokens at 512 px are mu 0.63, so t = 5/6 becomes 5 m / (5 m + 1), m = e^0.63."""
    (sd3 / "model_index.json").write_text(json.dumps(index_of(flux_file.LAYOUT.classes)))
    (sd3 / "transformer").mkdir()
    (sd3 / "transformer" / "config.json").write_text(json.dumps({"guidance_embeds": True}))
    shutil.copy(SHIPPED / "flux-dev" / "scheduler" / "scheduler_config.json", sd3 / "scheduler")
    assert main(["plan", "--model", str(sd3)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{sd3} by ddpo-g: 6 steps of flow-ddim, guidance 1, embedded guidance 3.5\n")
    table = rows(text)
    assert [row[1] for row in table[:2]] == ["1000.0", "903.7"]
    assert [row[4] for row in table] == ["yes"] * 5 + ["no"] and "drowns" not in text


def test_a_plan_names_trained_steps_that_drown_the_others():
    """On Shapes, the last but one, whose noise is small; docs/recipe.md has what the recipe does about it."""
    text = next(plan(make_config()))
    table = rows(text)
    assert [row[0] for row in table if float(row[3]) > SENSITIVE] == ["9"] and "Above 5 (step 9), a step drowns" in text
    text = next(plan(make_config(overrides={"policy": {"train_from": 0.5, "train_until": 0.8}})))
    assert [row[4] for row in rows(text)] == ["no"] * 5 + ["yes"] * 3 + ["no"] * 2 and "drowns" not in text


def test_a_plan_of_a_method_that_needs_no_noise(sd3):
    text = "\n".join(plan(make_config(overrides={"model": str(sd3), "algorithm": "draft"})))
    assert "trained" not in text.split("\n\n")[1] and "draft back-propagates the reward and needs no noise." in text


def test_a_plan_of_a_single_file_reads_its_header(tmp_path):
    unet = json.loads((SHIPPED / "sd1" / "unet" / "config.json").read_text())
    first, context = unet["block_out_channels"][0], unet["cross_attention_dim"]
    model = "model.diffusion_model.input_blocks"
    weights = {
        f"{model}.0.0.weight": torch.zeros(first, 4, 3, 3),
        f"{model}.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(640, context),
    }
    save_file(weights, tmp_path / "sd.safetensors")
    config = make_config(overrides={"model": str(tmp_path / "sd.safetensors"), "algorithm": "tdpo-r"})
    assert [row[1] for row in rows(next(plan(config)))] == [f"{1 + 50 * k:.1f}" for k in range(19, -1, -1)]
    assert outline(config.model).configs == SHIPPED / "sd1", "of which the rest is counted"


@pytest.mark.parametrize("preset", presets())
def test_a_presets_model_is_outlined_without_a_network(monkeypatch, preset):
    """By the package's own configurations, of which the networks are counted too."""
    monkeypatch.setattr(diffusers_folder, "hf_hub_download", pytest.fail)
    monkeypatch.setattr(diffusers_folder, "snapshot_download", pytest.fail)
    config = make_config(preset)
    outlined = outline(model_source(config), config.prediction_type)
    assert outlined.factor == 8
    if preset in FLOW_PRESETS:
        assert outlined.scheduler == FLOW_PRESETS[preset] and outlined.patch == 2
    if "turbo" in preset and preset not in FLOW_PRESETS:
        assert outlined.scheduler.config.timestep_spacing == "trailing"
    assert preset == "shapes-flow" or is_countable(outlined.configs)


def test_the_hub_is_asked_once_for_a_model_that_it_does_not_have(monkeypatch, capsys):
    asked = []

    def unreachable(repo, name):
        asked.append(name)
        raise OSError("no connection")

    monkeypatch.setattr(diffusers_folder, "hf_hub_download", unreachable)
    assert main(["plan", "--model", "nobody/nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'nobody/nothing' is not a file or folder here, and cannot be downloaded from the hub: no connection" in line
    assert asked == ["model_index.json"]


def test_a_folder_named_like_a_model_on_the_hub_is_that_folder(sd3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = "stabilityai/stable-diffusion-3.5-medium"
    (tmp_path / "stabilityai").mkdir()
    shutil.copytree(sd3, tmp_path / model, ignore=shutil.ignore_patterns("stabilityai"))
    change = tmp_path / model / "scheduler" / "scheduler_config.json"
    change.write_text(change.read_text().replace("3.0", "2.0"))
    assert outline(model).scheduler == FlowSchedule(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--process", "ddim"], "expected flow-ddim, flow-sde or cps: choose another process"),
        (["--resolution", "520"], "got resolution 520; expected a positive multiple of 16 pixels"),
        (["--steps", "1"], "got 1 denoising steps, of which none has noise"),
        (["--algorithm", "tdpo-r", "--critic.decoder", "no.pth"], "no.pth"),
        (["--model", "a" * 300], "aaa': File name too long; expected Stable Diffusion"),
    ],
)
def test_a_plan_of_no_run_says_why(sd3, capsys, options, message):
    assert main(["plan", "--model", str(sd3), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("preset", FLOW_PRESETS)
@pytest.mark.parametrize("process", ["flow-ddim", "flow-sde", "cps"])
@pytest.mark.parametrize("algorithm", ["ddpo-g", "tdpo-r", "grpo", "dpok", "sdpo"])
def test_no_step_that_a_flow_preset_trains_drowns_the_others(preset, process, algorithm):
    config = make_config(preset, overrides={"algorithm": algorithm})
    made = make_process(process, FLOW_PRESETS[preset], config.steps, torch.device("cpu"), (64, 64))
    assert made.sensitivity[window(config.policy, made.stochastic)].max() <= SENSITIVE


@pytest.mark.parametrize("process", ["flow-ddim", "flow-sde", "cps"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0, DynamicShift()])
@pytest.mark.parametrize("steps", [4, 10, 28])
def test_no_step_of_flow_matching_drowns_the_others(process, shift, steps):
    made = make_process(process, FlowSchedule(shift), steps, torch.device("cpu"), (128, 128))
    assert made.sensitivity[made.stochastic].max() <= SENSITIVE
