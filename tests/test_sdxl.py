"""Stable Diffusion XL, as a tiny pipeline of the true classes: loaded, conditioned and trained like diffusers' own."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from tiny_models import MODEL, edited, make_tiny_model

from comfy_tdpo.models import load_model
from comfy_tdpo.models.components import load_components

PROMPTS = ["a green rabbit", "WOW!! it's a cat", ""]
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def models(configs, tmp_path_factory) -> tuple[Path, Path]:
    """A diffusers folder and a single file with the same random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("sdxl"), configs / "sdxl")


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A copy of the folder, to be changed."""
    return shutil.copytree(models[0], tmp_path / "model")


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
        # float32 through some dozen layers; on some machines memory that is aligned otherwise takes another kernel
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.01


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


# --- LoRA files


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


# --- single files


def test_single_file_and_folder_are_one_model(models):
    folder, single = (load_components(str(path)) for path in models)
    for name in NETWORKS:
        expected, got = getattr(folder, name).state_dict(), getattr(single, name).state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    for name in ("tokenizer", "tokenizer_2"):
        prompts = [PROMPTS[0], ""]  # from a folder, transformers takes an "!" for padding
        expected, got = (getattr(parts, name)(prompts, padding="max_length") for parts in (folder, single))
        assert expected.input_ids == got.input_ids
    assert single.vae.config.scaling_factor == 0.13025
    stored = load_file(models[0] / "text_encoder_2" / "model.safetensors")
    assert torch.equal(stored["text_projection.weight"].float(), single.text_encoder_2.text_projection.weight)


def test_a_file_that_says_so_predicts_v(models, tmp_path):
    path = edited(models[1], tmp_path / "v.safetensors", lambda weights: weights.update(v_pred=torch.zeros(0)))
    assert load_components(path).scheduler.config.prediction_type == "v_prediction"
    assert load_components(str(models[1])).scheduler.config.prediction_type == "epsilon"


REFINER = {
    f"{MODEL}input_blocks.0.0.weight": torch.zeros(384, 4, 3, 3),
    f"{MODEL}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(768, 1280),
}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"edm_mean": torch.zeros(4)},
            "is Playground 2.5 or CosXL, with the noise levels of EDM; expected .*; choose a",
        ),
        ({"edm_vpred.sigma_max": torch.tensor(80.0)}, "is Playground 2.5 or CosXL, with the noise levels of EDM; exp"),
        (
            {f"{MODEL}time_embed.cond_proj.weight": torch.zeros(64, 256)},
            r"is a whole latent consistency model \(LCM\), .*; nearest to it is .* with an LCM LoRA$",
        ),
        (
            {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
            "is trained with zero terminal SNR .ztsnr.; .* a diffusers folder, .* timestep_spacing trailing",
        ),
        (REFINER, "is SDXL's refiner, which cannot begin from noise; expected .*; choose SDXL's base"),
        (
            {f"{MODEL}middle_block.1.transformer_blocks.2.norm1.bias": torch.zeros(64)},
            r"is SDXL made smaller: its middle has 3 transformer blocks, not 2 .*; save it as a diffusers folder",
        ),
    ],
)
def test_a_file_of_another_kind_is_named(models, tmp_path, more, message):
    path = edited(models[1], tmp_path / "other.safetensors", lambda weights: weights.update(more))
    with pytest.raises(ValueError, match=f"other.safetensors {message}"):
        load_components(path)


@pytest.mark.parametrize(
    ("part", "network"),
    [("conditioner.embedders.0.", "CLIPTextModel"), ("conditioner.embedders.1.", "CLIPTextModelWithProjection")],
)
def test_a_file_without_a_text_encoder_is_named(models, tmp_path, part, network):
    def drop(weights):
        for key in [key for key in weights if key.startswith(part)]:
            del weights[key]

    with pytest.raises(ValueError, match=rf"lacks \d+ weights? of the {network}, the first is "):
        load_components(edited(models[1], tmp_path / "part.safetensors", drop))
