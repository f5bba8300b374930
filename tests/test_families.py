"""What is alike in all published families, on tiny pipelines of the true classes."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline, ZImagePipeline
from family_training import check_lora_in_diffusers, check_training, trained_lora
from safetensors.torch import load_file
from tiny_models import change, make_tiny_flux, make_tiny_sd3, make_tiny_sdxl, make_tiny_z_image
from toy import same

from comfy_tdpo.models import denoiser_name, load_model, outline
from comfy_tdpo.models.lora import TARGETS
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.process.flow_schedule import DynamicShift, FlowSchedule
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.trainer.config import make_config

PROMPTS = ["a green circle", "a red rabbit"]
PIPELINES = {
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux-dev": FluxPipeline,
    "z-image-turbo": ZImagePipeline,
}
KINDS = (*PIPELINES, "flux-schnell")
FLOWS = {"sd3": "Stable Diffusion 3", "flux-dev": "FLUX.1", "z-image-turbo": "Z-Image"}  # -> their names in messages

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tokenizer, configs, tmp_path_factory) -> Folders:
    """Gives the folder of a kind of model, which is made once."""
    root = tmp_path_factory.mktemp("families")
    make: dict[str, Folders] = {
        "sdxl": lambda kind: make_tiny_sdxl(root / kind, tokenizer, configs),
        "sd3": lambda kind: make_tiny_sd3(root / kind, tokenizer),
        "sd3 without T5": lambda kind: make_tiny_sd3(root / kind, tokenizer, with_t5=False),
        "flux-dev": lambda kind: make_tiny_flux(root / kind, tokenizer),
        "flux-schnell": lambda kind: make_tiny_flux(root / kind, tokenizer, guided=False),
        "z-image": lambda kind: make_tiny_z_image(root / kind, shift=6.0),
        "z-image-turbo": lambda kind: make_tiny_z_image(root / kind),
    }
    return cache(lambda kind: make[kind](kind))


@pytest.fixture
def copy_of(folder_of, tmp_path) -> Folders:
    """Gives a copy of such a folder, to be changed."""
    return lambda kind: shutil.copytree(folder_of(kind), tmp_path / "model")


def latents_of(model) -> torch.Tensor:
    return torch.randn(2, model.channels, 8, 12, generator=torch.Generator().manual_seed(0))


# --- training


@pytest.mark.parametrize(
    ("kind", "algorithm", "train"),
    [
        *((kind, "tdpo-r", "lora") for kind in ("sdxl", "sd3", "flux-dev", "z-image-turbo")),
        *((kind, "ddpo-100", "lora") for kind in ("sdxl", "sd3", "flux-schnell", "z-image")),
        *((kind, "draft", "full") for kind in ("sdxl", "sd3", "flux-schnell", "z-image")),
    ],
)
def test_it_trains_and_resumes_to_the_last_bit(folder_of, tmp_path, kind, algorithm, train):
    """With classifier-free guidance. The other pairs of `algorithm` and `train` are tested on the flow of Shapes."""
    check_training(folder_of(kind), "32x64" if kind == "sdxl" else "16x24", tmp_path, algorithm, train)


@pytest.mark.parametrize("kind", FLOWS)
def test_gradients_are_the_same_with_checkpointing(folder_of, kind):
    found = []
    for checkpointing in (False, True):
        model = load_model(str(folder_of(kind)), torch.float32)
        lora = model.adapt(PolicySettings(gradient_checkpointing=checkpointing), seed=0)
        assert model.network.is_gradient_checkpointing == checkpointing
        output = model.denoise(latents_of(model), torch.tensor([500.0, 20.0]), model.encode(PROMPTS))
        output.square().mean().backward()
        found.append([parameter.grad for parameter in lora.parameters.values()])
    assert same(*found) and any(gradient.abs().max() > 0 for gradient in found[0])


@pytest.mark.parametrize("kind", FLOWS)
def test_all_weights_of_the_transformer_and_no_others_are_trained_if_asked(folder_of, kind):
    model = load_model(str(folder_of(kind)), torch.float32)
    trained = model.adapt(PolicySettings(train="full"), seed=0).parameters
    assert trained.keys() == dict(model.network.named_parameters()).keys()
    others = [network for name, network in model.networks.items() if name != "transformer"]
    assert not any(weight.requires_grad for network in others for weight in network.parameters())


@pytest.mark.parametrize("kind", FLOWS)
def test_sides_are_multiples_of_a_patch(folder_of, kind):
    model = load_model(str(folder_of(kind)), torch.float32)
    with pytest.raises(ValueError, match="got resolution 18; expected a positive multiple of 4 pixels"):
        DiffusionPolicy(model, resolution=18, steps=3, guidance=1.0)


# --- LoRA files


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", PIPELINES)
def test_diffusers_loads_a_lora_as_the_trained_policy(folder_of, tmp_path, kind, targets):
    model = load_model(str(folder_of(kind)), torch.float32)
    pipeline = PIPELINES[kind].from_pretrained(folder_of(kind)).to(torch.float32)
    inputs = latents_of(model), torch.tensor([10.0, 700.0]), PROMPTS
    check_lora_in_diffusers(model, pipeline, *inputs, tmp_path / "lora.safetensors", targets=targets)


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("kind", FLOWS)
def test_a_file_that_is_loaded_again_has_the_asked_strength(folder_of, tmp_path, kind, alpha):
    lora = trained_lora(load_model(str(folder_of(kind)), torch.float32), alpha=alpha)
    expected = {name: parameter.detach().clone() for name, parameter in lora.parameters.items()}
    lora.export(tmp_path / "lora.safetensors", {})
    weights = load_file(tmp_path / "lora.safetensors")
    assert all(
        name.startswith("transformer.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights
    )
    for strength in (0.5, 1.0):
        lora.load_exported(weights, strength)
        for name, parameter in lora.parameters.items():
            wanted = expected[name] * (strength if "lora_B" in name else 1)
            # by 7 / 4 and back: a bit of float32; exact where alpha is the rank
            torch.testing.assert_close(parameter.data, wanted, rtol=2e-7 if alpha else 0, atol=0)


# --- prompts


@pytest.mark.parametrize(
    ("kind", "most"), [("sd3", 256), ("sd3 without T5", 16), ("flux-dev", 512), ("flux-schnell", 256)]
)
def test_what_no_encoder_reads_is_named(folder_of, kind, most):
    encode = load_model(str(folder_of(kind)), torch.float32).encode
    long, short = ("a red circle " * 200).strip(), PROMPTS[0]
    assert encode.cut([short]) == "" and f"of at most {most}" in encode.cut([short, long])


# --- folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_id_loads_in_half_precision_and_offline_from_its_cache(folder_of, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "models--owner--mine", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder_of(kind), repo / "snapshots" / commit)
    got, expected = (load_model(name, torch.bfloat16) for name in ("owner/mine", str(folder_of(kind))))
    parts = [part.name for part in folder_of(kind).iterdir() if part.is_dir()]
    assert got.networks.keys() == {name for name in parts if not name.startswith(("tokenizer", "scheduler"))}
    for name, network in got.networks.items():
        weights = expected.networks[name].state_dict()
        assert all(torch.equal(weights[key], weight) for key, weight in network.state_dict().items())
        assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
        assert not any(weight.requires_grad for weight in network.parameters())
    assert denoiser_name(got) == denoiser_name(expected)
    outlined = outline("owner/mine")
    assert outlined.configs == repo / "snapshots" / commit, "counted like a folder"
    assert str(outlined._replace(configs=folder_of(kind))) == str(outline(str(folder_of(kind))))


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("sd3", FlowSchedule(3.0)),
        ("flux-dev", FlowSchedule(DynamicShift())),
        ("flux-schnell", FlowSchedule(1.0)),
        ("z-image", FlowSchedule(6.0)),
        ("z-image-turbo", FlowSchedule(3.0)),
    ],
)
def test_a_folder_begins_from_its_own_preset(folder_of, kind, schedule):
    """And its published hub id. The shift tells Z-Image-Turbo from the base model."""
    overrides = {"model": str(folder_of(kind)), "algorithm": "tdpo-r"}
    config = make_config(overrides=overrides)
    assert config == make_config(kind, overrides=overrides)
    assert config.critic.reads == "clean" and config.process is None
    assert config.embedded_guidance == (3.5 if kind == "flux-dev" else None)
    assert outline(config.model) == (schedule, "flow-ddim", 2, 2, folder_of(kind), ())
    published = make_config(kind)
    assert make_config(overrides={"model": published.model}) == published


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("kind", "name", "changes", "message"),
    [
        ("sdxl", INDEX, {"text_encoder": [None, None]}, "whose text_encoder is None, not CLIPTextModel"),
        ("sdxl", INDEX, {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "text_encoder_2 is T5EncoderMod"),
        ("sdxl", "unet/config.json", {"addition_embed_type": "text"}, "type 'text'.*expected 'text_time'"),
        ("sdxl", "unet/config.json", {"time_cond_proj_dim": 256}, r"consistency model \(LCM\), .*LCM LoRA$"),
        ("sdxl", "unet/config.json", {"in_channels": 9}, "takes 9 channels .inpainting"),
        ("sdxl", SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "the scheduler EDMEuler"),
        ("sd3", INDEX, {"text_encoder_2": [None, None]}, "whose text_encoder_2 is None, not CLIPTextModelWith"),
        ("sd3", INDEX, {"text_encoder_3": [None, None]}, "whose text_encoder_3 is None, not T5EncoderModel"),
        ("sd3", "vae/config.json", {"latent_channels": 4}, r"AutoencoderKL in .* is \(.*\), not \("),
        ("sd3", SCHEDULER, {"_class_name": "DDIMScheduler"}, "the scheduler DDIM.*FlowMatchEuler"),
        ("sd3", SCHEDULER, {"shift": 0}, "has shift 0; expected a number above 0"),
        ("flux-dev", INDEX, {"text_encoder_2": [None, None]}, "whose text_encoder_2 is None, not T5EncoderModel"),
        ("flux-dev", INDEX, {"vae": ["diffusers", "V"]}, "is a FluxPipeline whose vae is V, not AutoencoderKL"),
        (
            "flux-dev",
            "transformer/config.json",
            {"in_channels": 384, "out_channels": 64},
            r"takes 384 inputs for each patch, not 64 \(Fill, Depth, Canny\); expected .*; choose FLUX.1 dev or",
        ),
        ("flux-dev", SCHEDULER, {"_class_name": "DDIMScheduler"}, "the scheduler DDIM.*FlowMatchEuler"),
        ("z-image-turbo", INDEX, {"text_encoder": ["transformers", "T5EncoderModel"]}, "is T5Enc.*, not Qwen3Model"),
        ("z-image-turbo", "vae/config.json", {"latent_channels": 4}, r"AutoencoderKL in .* is \(.*\), not \("),
        ("z-image-turbo", "transformer/config.json", {"cap_feat_dim": 24}, r"ZImageTran.* in .* is \(.*\), not \("),
        ("z-image-turbo", "transformer/config.json", {"siglip_feat_dim": 24}, r"on images too \(Z-Image-Omni\); exp"),
        ("z-image-turbo", SCHEDULER, {"_class_name": "DDIMScheduler"}, "the scheduler DDIM.*FlowMatchEuler"),
    ],
)
def test_what_is_of_another_family_is_named(copy_of, kind, name, changes, message):
    folder = copy_of(kind)
    change(folder / name, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), torch.float32)


@pytest.mark.parametrize(
    ("kind", "part", "named"),
    [
        ("sdxl", "tokenizer_2", "tokenizer_2/vocab.json"),
        ("sd3", "tokenizer_3/tokenizer.json", "tokenizer_3/tokenizer.json"),
        ("sd3", "text_encoder_3/config.json", "text_encoder_3/config.json"),
        ("sd3", "tokenizer_2", "tokenizer_2/vocab.json"),
        ("flux-dev", "tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer.json"),
        ("flux-dev", "text_encoder_2/config.json", "text_encoder_2/config.json"),
        ("z-image-turbo", "tokenizer/tokenizer.json", "tokenizer/tokenizer.json"),
        ("z-image-turbo", "text_encoder/config.json", "text_encoder/config.json"),
        ("z-image-turbo", "scheduler", "scheduler/scheduler_config.json"),
    ],
)
def test_a_folder_that_lacks_a_part_is_asked_for_by_name(copy_of, kind, part, named):
    folder = copy_of(kind)
    path = folder / part
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(ValueError, match=f"{folder} lacks {named}; .*; download or save the whole folder again"):
        load_model(str(folder), torch.float32)


@pytest.mark.parametrize("kind", FLOWS)
def test_a_prediction_type_is_refused(folder_of, kind):
    with pytest.raises(ValueError, match=f"'epsilon', and {FLOWS[kind]} predicts the flow.*remove prediction_type"):
        load_model(str(folder_of(kind)), torch.float32, "epsilon")
