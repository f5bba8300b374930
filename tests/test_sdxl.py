"""Stable Diffusion XL, as a tiny pipeline of the true classes: loaded, conditioned and trained like diffusers' own."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_models import make_tiny_configs, make_tiny_model
from toy import lora_of, new_run, same, timeless, toy_training

from comfy_tdpo.models import load_model, shipped
from comfy_tdpo.models.components import load_components
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.settings import PolicySettings

PROMPTS = ["a green rabbit", "WOW!! it's a cat", ""]
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    return make_tiny_configs(tmp_path_factory.mktemp("configs") / "configs")


@pytest.fixture(scope="module")
def models(configs, tmp_path_factory) -> tuple[Path, Path]:
    """A diffusers folder and a single file with the same random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("sdxl"), configs / "sdxl")


@pytest.fixture(autouse=True)
def tiny(configs, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "CONFIGS", configs)


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A copy of the folder, to be changed."""
    return shutil.copytree(models[0], tmp_path / "model")


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- what the network is given


@torch.no_grad()
def test_a_step_is_that_of_diffusers_own_pipeline(models):
    """All inputs of the network are those of a whole pipeline, which draws an image that is not square."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(models[0]).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    forward = pipeline.unet.forward

    def recorded(*args, **kwargs):
        calls.append((args, forward(*args, **kwargs)[0]))
        return (calls[-1][1],)

    pipeline.unet.forward = recorded
    size = {"height": 64, "width": 96}
    pipeline(PROMPTS[:2], **size, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    model = load_model(str(models[0]), torch.float32)
    assert len(calls) == 2
    for (latents, time), expected in calls:
        assert latents.shape == (2, 4, 8, 12)
        got = model.denoise(latents, time.expand(2), model.encode(PROMPTS[:2]))
        assert torch.equal(got, expected) and expected.std() > 0.01


@torch.no_grad()
def test_sizes_and_pooled_states_make_a_difference(models):
    """So that the test above could fail."""
    model = load_model(str(models[0]), torch.float32)
    conditioning, generator = model.encode(PROMPTS), torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 12, generator=generator)
    expected = model.denoise(latents, torch.tensor([500] * 3), conditioning)
    model._sizes = lambda latents: torch.zeros(3, 6)
    assert not torch.equal(model.denoise(latents, torch.tensor([500] * 3), conditioning), expected)
    del model._sizes
    conditioning.parts["pooled"] = conditioning.parts["pooled"].flip(0)
    assert not torch.equal(model.denoise(latents, torch.tensor([500] * 3), conditioning), expected)


@torch.no_grad()
def test_the_empty_prompt_is_encoded_like_any_other(models):
    """As ComfyUI does; diffusers gives the network zeros, where no negative prompt is given."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(models[0]).to(torch.float32)
    states, _, pooled, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    got = load_model(str(models[0]), torch.float32).encode([""])
    assert torch.equal(got.parts["states"], states) and torch.equal(got.parts["pooled"], pooled)
    assert got.parts["states"].std() > 0.1 and got.summary().shape == (1, 80 + 48)


# --- training


def policy_of(folder: Path, ema: float = 0.0, **settings) -> DiffusionPolicy:
    model = load_model(str(folder), torch.float32)
    return DiffusionPolicy(model, resolution="64x96", settings=PolicySettings(ema=ema), **settings)


@pytest.mark.parametrize("algorithm", ["tdpo-r", "ddpo-100", "draft"])
def test_it_trains_and_resumes_to_the_last_bit(models, tmp_path, algorithm):
    small = {"epochs": 2, "samples_per_epoch": 4, "samples_per_update": 2, "steps": 3, "guidance": 3.0}
    small |= {"kl": {"coefficient": 0.1}} if algorithm != "draft" else {"last_steps": 1}
    make = partial(policy_of, models[0])
    whole = toy_training(new_run(tmp_path / "whole", algorithm=algorithm, **small), make)
    start = lora_of(whole)
    expected = list(whole.epochs())
    assert all(math.isfinite(value) for line in expected for value in line.values())
    if algorithm != "draft":
        assert [line["policy/ratio_drift"] for line in expected] == [0, 0]
    assert not same(start, lora_of(whole))
    run = new_run(tmp_path / "stopped", algorithm=algorithm, **small)
    epochs = toy_training(run, make).epochs()
    next(epochs)
    epochs.close()
    resumed = toy_training(run, make)
    list(resumed.epochs())
    assert timeless(run.metrics()) == timeless(expected) and same(lora_of(resumed), lora_of(whole))


# --- folders


def test_a_folder_loads_in_half_precision_and_from_fp16_variants(models, folder):
    expected = load_components(str(models[0]), torch.bfloat16)
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    got = load_components(str(folder), torch.bfloat16)
    for name in NETWORKS:
        ours, theirs = getattr(got, name).state_dict(), getattr(expected, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert {weight.dtype for weight in getattr(got, name).parameters()} == {torch.bfloat16}
    model = load_model(str(folder), torch.bfloat16)
    assert model.networks.keys() == set(NETWORKS)
    assert not any(weight.requires_grad for network in model.networks.values() for weight in network.parameters())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "whose text_encoder is None, not CLIPTextModel"),
        ("model_index.json", {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "text_encoder_2 is T5EncoderMod"),
        ("unet/config.json", {"addition_embed_type": "text"}, "has addition_embed_type 'text'.*expected 'text_time'"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "more than text and timestep .time_cond_proj_dim 256"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels .inpainting"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "the scheduler EDMEuler"),
    ],
)
def test_what_is_no_sdxl_is_named(folder, name, changes, message):
    change(folder / name, **changes)
    with pytest.raises(ValueError, match=message):
        load_components(str(folder))


def test_a_folder_without_its_second_tokenizer_is_named(folder):
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(ValueError, match="lacks tokenizer_2/vocab.json"):
        load_components(str(folder))
