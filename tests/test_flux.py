"""FLUX.1, as tiny pipelines of the true classes: loaded, conditioned and trained like diffusers' own."""

import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from family_training import trained_lora
from safetensors.torch import load_file, save_file
from tiny_models import change, make_tiny_flux, vae_to_ldm
from toy import same
from transformers import T5Config, T5EncoderModel

from comfy_tdpo.models import load_model, outline, shipped
from comfy_tdpo.models.flux import packed, unpacked
from comfy_tdpo.models.flux_file import to_diffusers
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.process import make_process
from comfy_tdpo.trainer.config import make_config

PROMPTS = ["a green circle", "a red rabbit"]
KINDS = {"dev": True, "schnell": False}  # whether they are conditioned on guidance
LENGTHS = {"dev": 512, "schnell": 256}  # tokens of T5, of the published pipelines


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux")
    return {name: make_tiny_flux(root / name, tokenizer, guided) for name, guided in KINDS.items()}


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A copy of the folder of dev, to be changed."""
    return shutil.copytree(models["dev"], tmp_path / "model")


def pipeline_of(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inputs_of(model):
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([10.0, 700.0]), model.encode(PROMPTS)


# --- what the network is given


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_diffusers_own_pipeline(models, kind):
    """All inputs of the network are those of a whole pipeline, which draws an image that is not square."""
    pipeline, calls = pipeline_of(models[kind]), []
    forward = pipeline.transformer.forward

    def recorded(**kwargs):
        calls.append((kwargs, forward(**kwargs)[0]))
        return (calls[-1][1],)

    pipeline.transformer.forward = recorded
    length, guided = LENGTHS[kind], {"guidance_scale": 2.0}
    pipeline(PROMPTS, height=16, width=24, num_inference_steps=2, max_sequence_length=length, **guided)
    model = load_model(str(models[kind]), torch.float32)
    assert (model.channels, model.embedded_guidance) == (16, 3.5 if KINDS[kind] else None)
    if KINDS[kind]:
        model.embedded_guidance = 2.0
    conditioning = model.encode(PROMPTS)
    assert conditioning.parts["states"].shape == (2, length, 64) and conditioning.parts["pooled"].shape == (2, 32)
    assert len(calls) == 2
    for given, expected in calls:
        latents, times = unpacked(given["hidden_states"], 4), 1000 * given["timestep"]
        assert latents.shape == (2, 16, 8, 12) and torch.equal(packed(latents), given["hidden_states"])
        output = model.denoise(latents, times, conditioning)
        # float32: 1000 t / 1000 is t but for the last bit
        torch.testing.assert_close(packed(output), expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.01
    theirs = pipeline._unpack_latents(given["hidden_states"], 16, 24, pipeline.vae_scale_factor)
    assert torch.equal(latents, theirs)


@torch.no_grad()
def test_every_part_of_the_conditioning_makes_a_difference(models):
    """So that the test above could fail."""
    model = load_model(str(models["dev"]), torch.float32)
    latents, times, conditioning = inputs_of(model)
    expected = model.denoise(latents, times, conditioning)
    assert conditioning.summary().shape == (2, 64 + 32)
    for part, rows in (("states", slice(0, 1)), ("states", slice(-1, None)), ("pooled", slice(None))):
        other = model.encode(PROMPTS)
        other.parts[part][:, rows] += 1
        assert not torch.equal(model.denoise(latents, times, other), expected)
    model.embedded_guidance = 2.0
    assert not torch.equal(model.denoise(latents, times, conditioning), expected)


@torch.no_grad()
def test_images_are_decoded_as_by_the_pipeline(models):
    pipeline, model = pipeline_of(models["dev"]), load_model(str(models["dev"]), torch.float32)
    latents = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    how = {"height": 16, "width": 24, "num_inference_steps": 1, "max_sequence_length": 8}
    image = pipeline("a", **how, output_type="pt", callback_on_step_end=lambda *_: {"latents": packed(latents)}).images
    # float32: images in [0, 1]
    torch.testing.assert_close(model.decode(latents), image, rtol=0, atol=1e-5)


def test_guidance_is_set_where_the_network_takes_it(models):
    make = partial(DiffusionPolicy, steps=3, guidance=1.0, resolution="16x24")
    dev, schnell = (load_model(str(models[kind]), torch.float32) for kind in KINDS)
    assert make(dev, embedded_guidance=2.5).model.embedded_guidance == 2.5
    with pytest.raises(ValueError, match="got embedded_guidance 2.5 for .*schnell, which is not conditioned on guid"):
        make(schnell, embedded_guidance=2.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_levels_are_those_of_the_pipeline(models, kind):
    """Of dev they depend on the size of the image, of schnell they do not."""
    pipeline, model = pipeline_of(models[kind]), load_model(str(models[kind]), torch.float32)
    for size, tokens in (((8, 8), 16), ((8, 12), 24), ((128, 128), 4096)):
        process = make_process(model.process, model.scheduler, 6, torch.device("cpu"), size)
        mu = calculate_shift(tokens)  # with diffusers' defaults, those of the published folders
        pipeline.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).numpy(), mu=mu)
        # float32 of numbers up to 1000
        torch.testing.assert_close(process.times, pipeline.scheduler.timesteps, rtol=1e-6, atol=0)


# --- LoRA files


def test_the_file_names_the_layers_of_both_kinds_of_blocks_and_no_alpha(models, tmp_path):
    """And not the network's last layer, whose name ends like one of a block."""
    lora = trained_lora(load_model(str(models["dev"]), torch.float32), targets="attention+feed-forward")
    lora.export(tmp_path / "lora.safetensors", {})
    attention = ("to_q", "to_k", "to_v")
    text = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    feed_forward = [f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")]
    layers = [f"transformer_blocks.0.attn.{layer}" for layer in (*attention, "to_out.0", *text)]
    layers += [f"transformer_blocks.0.{layer}" for layer in feed_forward]
    single = (*(f"attn.{layer}" for layer in attention), "proj_mlp", "proj_out")
    layers += [f"single_transformer_blocks.0.{layer}" for layer in single]
    assert load_file(tmp_path / "lora.safetensors").keys() == {
        f"transformer.{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"
    }


# --- folders


def test_parts_of_different_models_are_named(folder):
    config = T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    shutil.rmtree(folder / "text_encoder_2")
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
    with pytest.raises(
        ValueError, match="text width 64 and pooled width 32, .* text encoders of widths 32 and 32; exp"
    ):
        load_model(str(folder), torch.float32)


# --- single files


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory) -> dict[str, Path]:
    """Folders with the tokenizer of CLIP that ships with the package, as a single file has no other."""
    root, tokenizer = tmp_path_factory.mktemp("flux-files"), shipped.clip_tokenizer(shipped.CONFIGS / "flux-dev")
    return {name: make_tiny_flux(root / name, tokenizer, guided) for name, guided in KINDS.items()}


def native(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a transformer in the original layout, from those of diffusers."""
    plain = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "norm.linear": "modulation.lin",
    }
    for layer, name in (("timestep", "time_in"), ("guidance", "guidance_in"), ("text", "vector_in")):
        for number, end in ((1, "in"), (2, "out")):
            plain[f"time_text_embed.{layer}_embedder.linear_{number}"] = f"{name}.{end}_layer"
    found = {}
    for key, weight in weights.items():
        layer, kind = key.rsplit(".", 1)
        block, place = "", ""
        if "blocks." in layer:
            block, number, layer = layer.removeprefix("single_").split(".", 2)
            place = f"{'single' if key.startswith('single') else 'double'}_blocks.{number}."
        single = place.startswith("single")
        if layer == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat(weight.chunk(2)[::-1])
        elif layer in ("attn.norm_q", "attn.norm_k"):
            norm = "query_norm" if layer.endswith("q") else "key_norm"
            found[f"{place}{'' if single else 'img_attn.'}norm.{norm}.scale"] = weight
        elif layer == "proj_out" and single:
            found[f"{place}linear2.{kind}"] = weight
        elif layer in ("attn.to_q", "attn.add_q_proj"):
            parts = [weights[key], *(weights[key.replace("_q", other)] for other in ("_k", "_v"))]
            if single:
                parts.append(weights[key.replace("attn.to_q", "proj_mlp")])
            fused = "linear1" if single else "img_attn.qkv" if layer == "attn.to_q" else "txt_attn.qkv"
            found[f"{place}{fused}.{kind}"] = torch.cat(parts)
        elif layer in plain:
            name = plain[layer]
            found[f"{place}{name}.{'scale' if name.endswith('_norm') else kind}"] = weight
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_conversion_is_that_of_diffusers(kind):
    """At true size, for one block of each kind; of each weight one column, as only rows are moved."""
    config = shipped.read_config(shipped.CONFIGS / f"flux-{kind}", "transformer/config.json")
    with init_empty_weights():
        network = FluxTransformer2DModel.from_config(config | {"num_layers": 1, "num_single_layers": 1})
    generator, expected = torch.Generator().manual_seed(0), {}
    for name, weight in network.state_dict().items():
        expected[name] = torch.rand(len(weight), *(1,) * (weight.ndim - 1), generator=generator)
    stored = native(expected)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(stored))
    ours = to_diffusers(stored, 3072)
    assert ours.keys() == theirs.keys() == expected.keys()
    assert all(
        torch.equal(weight, theirs[name]) and torch.equal(weight, expected[name]) for name, weight in ours.items()
    )


@pytest.fixture
def tiny_configs(with_clip, tmp_path, monkeypatch) -> None:
    """The shipped configurations are those of the tiny models."""
    for kind, folder in with_clip.items():
        for part in ("transformer", "scheduler", "vae", "text_encoder", "text_encoder_2"):
            shutil.copytree(folder / part, tmp_path / "configs" / f"flux-{kind}" / part)
        shutil.copytree(shipped.CONFIGS / f"flux-{kind}" / "tokenizer", tmp_path / "configs" / f"flux-{kind}/tokenizer")
    monkeypatch.setattr(shipped, "CONFIGS", tmp_path / "configs")


def weights_in(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return {key: weight for path in (folder / part).glob("*.safetensors") for key, weight in load_file(path).items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_the_transformer_reads_the_rest_from_its_folder(with_clip, tmp_path, tiny_configs, kind, prefix):
    folder = shutil.copytree(with_clip[kind], tmp_path / "model")
    stored = native(weights_in(folder, "transformer"))
    if prefix:  # newer versions of ComfyUI save these under another name
        stored = {key.replace("_norm.scale", "_norm.weight"): weight for key, weight in stored.items()}
    shutil.rmtree(folder / "transformer")
    save_file({prefix + key: weight + 0 for key, weight in stored.items()}, folder / "mine.safetensors")
    got, expected = (
        load_model(str(folder / "mine.safetensors"), torch.float32),
        load_model(str(with_clip[kind]), torch.float32),
    )
    latents, times, conditioning = inputs_of(expected)
    assert got.scheduler == expected.scheduler and got.embedded_guidance == expected.embedded_guidance
    assert torch.equal(got.denoise(latents, times, conditioning), expected.denoise(latents, times, conditioning))
    assert torch.equal(got.decode(latents), expected.decode(latents))
    assert torch.equal(got.encode(PROMPTS).parts["states"], conditioning.parts["states"])
    outlined = outline(str(with_clip[kind]))
    assert outline(got.source) == outlined._replace(configs=shipped.CONFIGS / f"flux-{kind}")
    assert make_config(overrides={"model": got.source}) == make_config(f"flux-{kind}", overrides={"model": got.source})


def test_a_whole_file_needs_only_the_tokenizer_of_t5(with_clip, tmp_path, tiny_configs):
    weights = native(weights_in(with_clip["dev"], "transformer"))
    whole = {f"model.diffusion_model.{key}": weight + 0 for key, weight in weights.items()}
    for part, prefix in (("text_encoder", "clip_l"), ("text_encoder_2", "t5xxl")):
        for key, weight in weights_in(with_clip["dev"], part).items():
            whole[f"text_encoders.{prefix}.transformer.{key}"] = weight
    autoencoder = vae_to_ldm(AutoencoderKL.from_pretrained(with_clip["dev"] / "vae"))
    whole |= {f"vae.{key}": weight.contiguous() for key, weight in autoencoder.items()}
    folder = tmp_path / "alone"
    folder.mkdir()
    path = folder / "whole.safetensors"
    save_file(whole, path)
    with pytest.raises(ValueError, match=f"{path} has transformer, .*_2 of FLUX.1, and neither .* has tokenizer_2;"):
        load_model(str(path), torch.float32)
    shutil.copytree(with_clip["dev"] / "tokenizer_2", folder / "tokenizer_2")
    config = shipped.CONFIGS / "flux-dev" / "text_encoder_2" / "config.json"
    change(config, vocab_size=4)
    with pytest.raises(ValueError, match="has a tokenizer_2 of 8 tokens and a text encoder of 4; expected both of the"):
        load_model(str(path), torch.float32)
    change(config, vocab_size=32)
    got, expected = load_model(str(path), torch.float32), load_model(str(with_clip["dev"]), torch.float32)
    for name, network in expected.networks.items():
        assert same(list(got.networks[name].parameters()), list(network.parameters()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"img_in.weight": (3072, 384)}, r"takes 384 inputs for each patch, not 64 \(Fill, Depth, Canny\)"),
        ({"img_in.weight": (3072, 128)}, "takes 128 inputs for each patch, not 64"),
        ({"distilled_guidance_layer.norms.0.scale": (8,)}, "is Chroma; expected"),
        ({"double_stream_modulation_img.lin.weight": (8, 8)}, "is Flux 2; expected"),
        ({"img_in.bias": (3072,), "img_in.weight.absmax": (8,)}, "bitsandbytes in 4 bits"),
    ],
)
def test_relatives_of_flux_are_named(tmp_path, more, message):
    path, shapes = tmp_path / "mine.safetensors", {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)} | more
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    with pytest.raises(ValueError, match=f"mine.safetensors.*{message}"):
        load_model(str(path), torch.float32)


def test_the_shipped_configurations_are_those_of_the_published_model():
    """As diffusers' classes have them by default, and the numbers of weights that are published."""
    for kind, guided in KINDS.items():
        configs = shipped.CONFIGS / f"flux-{kind}"
        with init_empty_weights():
            network = FluxTransformer2DModel.from_config(shipped.read_config(configs, "transformer/config.json"))
            plain = FluxTransformer2DModel(guidance_embeds=guided)
            t5 = T5EncoderModel(T5Config.from_pretrained(configs / "text_encoder_2"))
        assert {key: weight.shape for key, weight in network.state_dict().items()} == {
            key: weight.shape for key, weight in plain.state_dict().items()
        }
        billions = sum(weight.numel() for weight in network.parameters()) / 1e9
        assert math.isclose(billions, 11.9, abs_tol=0.05)
        weights = t5.state_dict()
        weights.pop("encoder.embed_tokens.weight", None)  # the same as shared.weight
        assert math.isclose(sum(weight.numel() for weight in weights.values()) / 1e9, 4.76, abs_tol=0.01)
