"""Stable Diffusion 3, as a tiny pipeline of the true classes: loaded, conditioned and trained like diffusers' own."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from family_training import trained_lora
from safetensors.torch import load_file, save_file
from tiny_models import MODEL, change, make_tiny_sd3, make_tiny_sd3_file

from comfy_tdpo.models import load_model, outline, shipped
from comfy_tdpo.models.scheduler import load_flow_schedule
from comfy_tdpo.models.stable_diffusion_3 import LORA_MODULES, T5_TOKENS
from comfy_tdpo.process.flow_schedule import DynamicShift, FlowSchedule
from comfy_tdpo.trainer.config import make_config

PROMPTS = ["a green circle", "a red rabbit"]


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Two folders, with T5 and without."""
    root = tmp_path_factory.mktemp("sd3")
    return {name: make_tiny_sd3(root / name, tokenizer, name == "t5") for name in ("t5", "clip")}


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A copy of the folder with T5, to be changed."""
    return shutil.copytree(models["t5"], tmp_path / "model")


def pipeline_of(folder: Path) -> StableDiffusion3Pipeline:
    without = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- what the network is given


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_step_is_that_of_diffusers_own_pipeline(models, kind):
    """All inputs of the network are those of a whole pipeline, which draws an image that is not square."""
    pipeline, calls = pipeline_of(models[kind]), []
    forward = pipeline.transformer.forward

    def recorded(**kwargs):
        calls.append((kwargs, forward(**kwargs)[0]))
        return (calls[-1][1],)

    pipeline.transformer.forward = recorded
    size = {"height": 16, "width": 24}
    image = pipeline(PROMPTS, **size, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    model = load_model(str(models[kind]), torch.float32)
    assert len(calls) == 2
    conditioning = model.encode(PROMPTS)
    assert conditioning.parts["states"].shape == (2, model.encode.clips[0].length + T5_TOKENS, 64)
    for given, expected in calls:
        latents, times = given["hidden_states"], given["timestep"]
        assert latents.shape == (2, 16, 8, 12)
        assert torch.equal(model.denoise(latents, times, conditioning), expected) and expected.std() > 0.01
    pipeline.scheduler.set_timesteps(2)
    last = pipeline.scheduler.sigmas[1:]
    final = latents + (last[1] - last[0]) * expected
    # float32: images in [0, 1]
    torch.testing.assert_close(model.decode(final), image, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_part_of_the_conditioning_makes_a_difference(models):
    """So that the test above could fail."""
    model, generator = load_model(str(models["t5"]), torch.float32), torch.Generator().manual_seed(0)
    latents, times = torch.randn(2, 16, 8, 12, generator=generator), torch.tensor([900.5, 30.0])
    conditioning = model.encode(PROMPTS)
    expected = model.denoise(latents, times, conditioning)
    assert conditioning.summary().shape == (2, 64 + 48)
    for part, rows in (("states", slice(0, 4)), ("states", slice(-T5_TOKENS, None)), ("pooled", slice(None))):
        other = model.encode(PROMPTS)
        other.parts[part][:, rows] += 1
        assert not torch.equal(model.denoise(latents, times, other), expected)


# --- LoRA files


def test_the_file_names_every_attention_layer_and_no_alpha(models, tmp_path):
    """The first block has a second attention to the image alone, and the last block drops the text."""
    lora = trained_lora(load_model(str(models["t5"]), torch.float32))
    lora.export(tmp_path / "lora.safetensors", {})
    image = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [f"{block}.attn.{layer}" for block in (0, 1) for layer in (*image, *LORA_MODULES["attention"][4:7])]
    layers += ["0.attn.to_add_out", *(f"0.attn2.{layer}" for layer in image)]
    assert load_file(tmp_path / "lora.safetensors").keys() == {
        f"transformer.transformer_blocks.{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"
    }


# --- folders


def test_parts_of_different_models_are_named(models, folder, tokenizer, tmp_path):
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    with pytest.raises(ValueError, match="pooled width 48, .* text encoders of widths 32 and 64 and pooled width 32"):
        load_model(str(folder), torch.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dynamic_shifting": True}, FlowSchedule(DynamicShift())),
        ({"use_dynamic_shifting": True, "max_shift": 1.2, "time_shift_type": "linear"}, DynamicShift(most=1.2)),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 1.0}, FlowSchedule()),
    ],
)
def test_schedules_are_read_from_their_file(folder, changes, expected):
    path = folder / "scheduler" / "scheduler_config.json"
    change(path, **changes)
    if isinstance(expected, DynamicShift):
        expected = FlowSchedule(expected._replace(exponential=False))
    assert load_flow_schedule(path) == expected


# --- single files


@pytest.fixture(scope="module")
def single(configs, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder, and the weights of a file with all of it."""
    return make_tiny_sd3_file(tmp_path_factory.mktemp("sd3-file") / "folder", configs / "sd3")


@pytest.fixture(scope="module")
def whole(single):
    """The model in that folder, to be compared with."""
    return load_model(str(single[0]), torch.float32)


def without(weights: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if not name.startswith(prefixes)}


TEXTS, T5 = "text_encoders.", "text_encoders.t5xxl."


@torch.no_grad()
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("missing", "prefix", "beside"),
    [
        ((), MODEL, ["tokenizer_3"]),
        ((T5,), MODEL, []),
        ((T5, "text_encoders.clip_g."), "", ["text_encoder_2"]),
        ((TEXTS, "first_stage_model."), "", ["text_encoder", "text_encoder_2", "vae"]),
        ((TEXTS,), MODEL, ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_3"]),
    ],
    ids=["all in one", "without T5", "bare, without bigG", "the transformer alone", "without any text encoder"],
)
def test_single_file_and_folder_are_one_model(single, whole, tmp_path, missing, prefix, beside):
    """What the file lacks is read from the folders beside it."""
    folder, weights = single
    for name in beside:
        shutil.copytree(folder / name, tmp_path / name)
    path = tmp_path / "model.safetensors"
    kept = without(weights, *missing)
    save_file({name.replace(MODEL, prefix): weight for name, weight in kept.items()}, path)
    got, expected = load_model(str(path), torch.float32), whole
    without_t5 = "tokenizer_3" not in beside
    assert got.networks.keys() == expected.networks.keys() - ({"text_encoder_3"} if without_t5 else set())
    for name, network in got.networks.items():
        wanted = expected.networks[name].state_dict()
        assert network.state_dict().keys() == wanted.keys() and not network.training
        assert all(torch.equal(weight, wanted[key]) for key, weight in network.state_dict().items())
    conditioning, wanted = got.encode(PROMPTS), expected.encode(PROMPTS)
    if without_t5:
        wanted.parts["states"][:, -T5_TOKENS:] = 0
    assert all(torch.equal(part, wanted.parts[name]) for name, part in conditioning.parts.items())
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    inputs = latents, torch.tensor([900.5, 30.0]), conditioning
    assert torch.equal(got.denoise(*inputs), expected.denoise(*inputs))
    assert torch.equal(got.decode(latents), expected.decode(latents))
    absent = ("text_encoder_3", "tokenizer_3") if without_t5 else ()
    assert outline(str(path)) == (FlowSchedule(3.0), "flow-ddim", 8, 2, None, absent)
    assert outline(str(folder)) == outline(str(path))._replace(configs=folder, absent=())
    config = make_config(overrides={"model": str(path)})
    assert config == make_config("sd3", overrides={"model": str(path)})


def test_a_file_is_counted_by_the_published_sizes_if_it_has_them(single, configs, tmp_path, monkeypatch):
    folder, weights = single
    path = tmp_path / "model.safetensors"
    save_file(without(weights, T5), path)
    assert outline(str(path)).configs is None
    published = shutil.copytree(configs, tmp_path / "configs")
    shutil.copytree(folder / "transformer", published / "sd3" / "transformer", dirs_exist_ok=True)
    monkeypatch.setattr(shipped, "CONFIGS", published)
    assert outline(str(path)).configs == published / "sd3"


@pytest.mark.usefixtures("tiny")
def test_a_file_without_clips_projection_has_the_identity(single, tmp_path):
    """As published files are."""
    weights = without(single[1], T5, "text_encoders.clip_l.transformer.text_projection")
    save_file(weights, tmp_path / "model.safetensors")
    model = load_model(str(tmp_path / "model.safetensors"), torch.bfloat16)
    assert torch.equal(model.networks["text_encoder"].text_projection.weight.float(), torch.eye(16))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: without(weights, TEXTS),
            "has transformer, vae of .* has text_encoder, text_encoder_2; exp",
        ),
        (
            lambda weights: weights,
            "neither .* has tokenizer_3; .*, or choose a file with .* without T5",
        ),
        (
            lambda weights: without(weights, T5, f"{MODEL}joint_blocks.1.x_block.mlp.fc1.bias"),
            "lacks joint_blocks.1.x_block.mlp.fc1.bias; expected Stable",
        ),
        (lambda weights: without(weights, T5, f"{MODEL}pos_embed"), "a transformer whose pos_embed is missing; exp"),
        (
            lambda weights: without(weights, T5) | {f"{MODEL}y_embedder.mlp.0.weight": torch.zeros(128, 64)},
            "pooled width 64, .* text encoders of widths 48 and 64 and pooled width 48; expected all of the same",
        ),
        (
            lambda weights: without(weights, T5) | {f"{MODEL}x_embedder.proj.weight.absmax": torch.zeros(3)},
            "is quantised in a way that cannot be trained: bitsandbytes in 4 bits",
        ),
    ],
    ids=["no encoder", "no tokenizer", "no bias", "no places", "another width", "4 bits"],
)
def test_what_a_file_lacks_is_named(single, tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_file(change(single[1]), path)
    with pytest.raises(ValueError, match=f"model.safetensors .*{message}"):
        load_model(str(path), torch.float32)


@pytest.mark.usefixtures("tiny")
def test_float8_with_scales_loads(single, tmp_path):
    """As published with T5 in float8."""
    weights, name = dict(without(single[1], T5)), f"{MODEL}joint_blocks.0.x_block.mlp.fc1"
    scale = weights[f"{name}.weight"].abs().max() / 448
    codes = (weights[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    weights |= {f"{name}.weight": codes, f"{name}.scale_weight": scale, f"{MODEL}scaled_fp8": torch.zeros(0)}
    save_file(weights, tmp_path / "model.safetensors")
    model = load_model(str(tmp_path / "model.safetensors"), torch.float32)
    assert torch.equal(model.network.transformer_blocks[0].ff.net[0].proj.weight, codes.float() * scale)


@pytest.mark.usefixtures("tiny")
def test_3_5_large_is_refused_by_name(single, folder, tmp_path):
    """By its 38 blocks, before anything large is read."""
    blocks = {f"{MODEL}joint_blocks.{i}.x_block.attn.proj.bias": torch.zeros(1) for i in range(38)}
    save_file(without(single[1], TEXTS) | blocks, tmp_path / "large.safetensors")  # published without text encoders
    change(folder / "transformer" / "config.json", num_layers=38)
    for source in (tmp_path / "large.safetensors", folder):
        for read in (lambda source: load_model(source, torch.float32), outline):
            with pytest.raises(ValueError, match=r"3.5 large; expected .*; nearest to it is .* 3.5 medium$"):
                read(str(source))
