"""FLUX.1, as tiny pipelines of the true classes: loaded, conditioned and trained like diffusers' own."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from family_training import TRAININGS, check_training
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_flux
from toy import same
from transformers import T5Config, T5EncoderModel

from comfy_tdpo.models import load_model, outline, shipped
from comfy_tdpo.models.flux import packed, unpacked
from comfy_tdpo.models.flux_file import to_diffusers
from comfy_tdpo.models.lora import TARGETS
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.process import make_process
from comfy_tdpo.process.flow_schedule import DynamicShift, FlowSchedule
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.trainer.config import make_config

PROMPTS = ["a green circle", "a red rabbit"]
KINDS = {"dev": True, "schnell": False}  # whether they are conditioned on guidance
LENGTHS = {"dev": 512, "schnell": 256}  # tokens of T5, of the published pipelines


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """With the tokenizer of CLIP that ships with the package, as a single file has no other."""
    root, tokenizer = tmp_path_factory.mktemp("flux"), shipped.clip_tokenizer(shipped.CONFIGS / "flux-dev")
    return {name: make_tiny_flux(root / name, tokenizer, guided) for name, guided in KINDS.items()}


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A copy of the folder of dev, to be changed."""
    return shutil.copytree(models["dev"], tmp_path / "model")


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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


@pytest.mark.parametrize("kind", KINDS)
def test_what_t5_does_not_read_is_named(models, kind):
    encode, least = load_model(str(models[kind]), torch.float32).encode, LENGTHS[kind]
    long, short = ("a red circle " * 200).strip(), PROMPTS[0]
    assert encode.cut([short]) == "" and f"of at most {least}" in encode.cut([short, long])


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


# --- training


@pytest.mark.parametrize(("algorithm", "train"), TRAININGS)
def test_it_trains_and_resumes_to_the_last_bit(models, tmp_path, algorithm, train):
    """With and without guidance of the network's own; classifier-free guidance is on in all."""
    kind = "schnell" if train == "full" else "dev"
    check_training(models[kind], "16x24", tmp_path, algorithm, train)


def test_gradients_are_the_same_with_checkpointing(models):
    found = []
    for checkpointing in (False, True):
        model = load_model(str(models["dev"]), torch.float32)
        lora = model.adapt(PolicySettings(gradient_checkpointing=checkpointing), seed=0)
        assert model.network.is_gradient_checkpointing == checkpointing
        model.denoise(*inputs_of(model)).square().mean().backward()
        found.append([parameter.grad for parameter in lora.parameters.values()])
    assert same(*found) and any(gradient.abs().max() > 0 for gradient in found[0])


# --- LoRA files


def trained_lora(model, **settings):
    lora, generator = model.adapt(PolicySettings(rank=4, **settings), seed=0), torch.Generator().manual_seed(0)
    for name, parameter in lora.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return lora


@torch.no_grad()
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_a_lora_as_the_trained_policy(models, tmp_path, targets, kind):
    model = load_model(str(models[kind]), torch.float32)
    lora = trained_lora(model, alpha=7.0, targets=targets)
    lora.export(tmp_path / "lora.safetensors", {})
    pipeline = pipeline_of(models[kind])
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(lora.parameters)
    inputs = inputs_of(model)
    expected = model.denoise(*inputs)
    with lora.reference():
        base = model.denoise(*inputs)
    model.network = pipeline.transformer
    # float32: outputs near 1; alpha is multiplied in at another place, 6e-8 a layer
    torch.testing.assert_close(model.denoise(*inputs), expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2, "the LoRA must make a difference"


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_in_half_precision_and_offline_from_the_hubs_cache(models, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "hub" / "models--owner--flux", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(models[kind], repo / "snapshots" / commit)
    got, expected = (load_model(name, torch.bfloat16) for name in ("owner/flux", str(models[kind])))
    assert got.networks.keys() == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for name, network in got.networks.items():
        weights = expected.networks[name].state_dict()
        assert all(torch.equal(weights[key], weight) for key, weight in network.state_dict().items())
        assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
        assert not any(weight.requires_grad for weight in network.parameters())
    assert outline("owner/flux").scheduler == FlowSchedule(DynamicShift() if KINDS[kind] else 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_begins_from_its_own_preset(models, kind):
    overrides = {"model": str(models[kind]), "algorithm": "tdpo-r"}
    config = make_config(overrides=overrides)
    assert config == make_config(f"flux-{kind}", overrides=overrides)
    assert (config.guidance, config.embedded_guidance) == (1.0, 3.5 if KINDS[kind] else None)
    schedule = FlowSchedule(DynamicShift() if KINDS[kind] else 1.0)
    assert outline(config.model) == (schedule, "flow-ddim", 2, 2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("model_index.json", {"text_encoder_2": [None, None]}, "whose text_encoder_2 is None, not T5EncoderModel"),
        ("model_index.json", {"vae": ["diffusers", "V"]}, "is a FluxPipeline whose vae is V, not AutoencoderKL"),
        (
            "transformer/config.json",
            {"in_channels": 384, "out_channels": 64},
            r"takes 384 inputs for each patch, not 64 \(Fill, Depth, Canny\); expected .*; choose FLUX.1 dev or",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "the scheduler DDIM.*FlowMatchEuler"),
    ],
)
def test_what_is_no_flux_is_named(folder, name, changes, message):
    change(folder / name, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), torch.float32)


def test_parts_of_different_models_are_named(folder):
    config = T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    shutil.rmtree(folder / "text_encoder_2")
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
    with pytest.raises(
        ValueError, match="text width 64 and pooled width 32, .* text encoders of widths 32 and 32; exp"
    ):
        load_model(str(folder), torch.float32)


@pytest.mark.parametrize("part", ["tokenizer_2/tokenizer.json", "text_encoder_2/config.json"])
def test_a_folder_that_lacks_a_part_is_asked_for_by_name(folder, part):
    (folder / part).unlink()
    with pytest.raises(ValueError, match=f"{folder} lacks {part}.*; download or save the whole folder again"):
        load_model(str(folder), torch.float32)


def test_a_prediction_type_is_refused(models):
    with pytest.raises(ValueError, match="'epsilon', and FLUX.1 predicts the flow.*remove prediction_type"):
        load_model(str(models["dev"]), torch.float32, "epsilon")


# --- single files


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
def tiny_configs(models, tmp_path, monkeypatch) -> None:
    """The shipped configurations are those of the tiny models."""
    for kind, folder in models.items():
        for part in ("transformer", "scheduler", "vae", "text_encoder", "text_encoder_2"):
            shutil.copytree(folder / part, tmp_path / "configs" / f"flux-{kind}" / part)
        shutil.copytree(shipped.CONFIGS / f"flux-{kind}" / "tokenizer", tmp_path / "configs" / f"flux-{kind}/tokenizer")
    monkeypatch.setattr(shipped, "CONFIGS", tmp_path / "configs")


def weights_in(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return {key: weight for path in (folder / part).glob("*.safetensors") for key, weight in load_file(path).items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_the_transformer_reads_the_rest_from_its_folder(models, tmp_path, tiny_configs, kind, prefix):
    folder = shutil.copytree(models[kind], tmp_path / "model")
    stored = native(weights_in(folder, "transformer"))
    if prefix:  # newer versions of ComfyUI save these under another name
        stored = {key.replace("_norm.scale", "_norm.weight"): weight for key, weight in stored.items()}
    shutil.rmtree(folder / "transformer")
    save_file({prefix + key: weight + 0 for key, weight in stored.items()}, folder / "mine.safetensors")
    got, expected = (
        load_model(str(folder / "mine.safetensors"), torch.float32),
        load_model(str(models[kind]), torch.float32),
    )
    latents, times, conditioning = inputs_of(expected)
    assert got.scheduler == expected.scheduler and got.embedded_guidance == expected.embedded_guidance
    assert torch.equal(got.denoise(latents, times, conditioning), expected.denoise(latents, times, conditioning))
    assert torch.equal(got.decode(latents), expected.decode(latents))
    assert torch.equal(got.encode(PROMPTS).parts["states"], conditioning.parts["states"])
    assert outline(got.source) == outline(str(models[kind]))
    assert make_config(overrides={"model": got.source}) == make_config(f"flux-{kind}", overrides={"model": got.source})


def test_a_whole_file_needs_only_the_tokenizer_of_t5(models, tmp_path, tiny_configs):
    weights = native(weights_in(models["dev"], "transformer"))
    whole = {f"model.diffusion_model.{key}": weight + 0 for key, weight in weights.items()}
    for part, prefix in (("text_encoder", "clip_l"), ("text_encoder_2", "t5xxl")):
        for key, weight in weights_in(models["dev"], part).items():
            whole[f"text_encoders.{prefix}.transformer.{key}"] = weight
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copytree(models["dev"] / "vae", folder / "vae")  # converted in the test of Stable Diffusion
    path = folder / "whole.safetensors"
    save_file(whole, path)
    with pytest.raises(ValueError, match=f"{path} has transformer, .*_2 of FLUX.1, and neither .* has tokenizer_2;"):
        load_model(str(path), torch.float32)
    shutil.copytree(models["dev"] / "tokenizer_2", folder / "tokenizer_2")
    got, expected = load_model(str(path), torch.float32), load_model(str(models["dev"]), torch.float32)
    for name, network in expected.networks.items():
        assert same(list(got.networks[name].parameters()), list(network.parameters()))


def test_a_file_without_its_folder_names_what_it_needs(models, tmp_path, tiny_configs):
    path = tmp_path / "mine.safetensors"
    save_file({key: weight + 0 for key, weight in native(weights_in(models["dev"], "transformer")).items()}, path)
    with pytest.raises(
        ValueError,
        match="mine.safetensors has transformer of FLUX.1, and neither the file nor its folder has vae, text_encoder, "
        "text_encoder_2, tokenizer_2; expected the file to lie in a diffusers folder of FLUX.1, .*: move it into a",
    ):
        load_model(str(path), torch.float32)


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
