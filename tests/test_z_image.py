"""Z-Image, as a tiny pipeline of the true classes: loaded, conditioned and trained like diffusers' own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_models import SHIPPED, make_tiny_z_image, vae_to_ldm, z_image_to_native

from comfy_tdpo.methods.neurons import ActivationRecorder, policy_layers, reset_neurons
from comfy_tdpo.models import load_model, outline, shipped
from comfy_tdpo.models.conditioning import ListConditioning
from comfy_tdpo.models.lora import TransformerLora
from comfy_tdpo.models.z_image import LORA_MODULES, TEXT_TOKENS
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.process.flow_schedule import FlowSchedule
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.trainer.config import make_config

# 1 and 2 times 32 tokens with the chat's marks, one a letter
PROMPTS = ["a", "a small red rabbit"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return make_tiny_z_image(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    """A copy of the folder, to be changed."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def loaded(model_folder):
    return load_model(str(model_folder), torch.float32)


def pipeline_of(folder: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(rows: int) -> torch.Tensor:
    return torch.randn(rows, 16, 8, 12, generator=torch.Generator().manual_seed(0))


# --- what the network is given


@torch.no_grad()
def test_a_step_is_that_of_diffusers_own_pipeline(model_folder, loaded):
    """All inputs of the network, with guidance, of a whole pipeline that draws images that are not square."""
    pipeline, calls = pipeline_of(model_folder), []
    forward = pipeline.transformer.forward

    def recorded(x, t, cap_feats, **kwargs):
        calls.append((torch.stack(x), t, cap_feats, forward(x, t, cap_feats, **kwargs)[0]))
        return (calls[-1][3],)

    pipeline.transformer.forward = recorded
    size = {"height": 16, "width": 24}
    found = pipeline(list(PROMPTS), **size, num_inference_steps=2, guidance_scale=4.0, output_type="pt").images
    assert len(calls) == 2
    conditioning = ListConditioning.cat([loaded.encode(PROMPTS), loaded.encode(["", ""])])
    assert [len(states) for states in conditioning.states] == [20, 37, 19, 19]
    for latents, t, states, outputs in calls:
        # float32: one prompt at a time, without the padding that the pipeline masks
        for got, expected in zip(conditioning.states, states, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        ours = loaded.denoise(latents.squeeze(2), 1000 * (1 - t), conditioning)
        expected = -torch.stack(outputs).squeeze(2)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.1
    u, v = expected[2:], expected[:2]
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.5])
    policy = DiffusionPolicy(loaded, resolution="24x16", steps=2, guidance=5.0, process="flow-ddim")
    assert policy.process.times.tolist() == pipeline.scheduler.timesteps.tolist()
    final = latents[:2].squeeze(2) - pipeline.scheduler.sigmas[1] * (u + 5 * (v - u))
    torch.testing.assert_close(policy.decode(final), found, rtol=0, atol=1e-5)
    mine = policy.step(latents[:2].squeeze(2), torch.tensor([1, 1]), loaded.encode(PROMPTS)).mean
    torch.testing.assert_close(mine, final, rtol=0, atol=1e-4)  # five times the difference of two outputs


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(loaded):
    """To the last bit, or ratios would: a batch of prompts of different lengths would be masked."""
    latents, times, conditioning = drawn(3), torch.tensor([900.5, 30.0, 500.0]), loaded.encode([*PROMPTS, "a red"])
    together = loaded.denoise(latents, times, conditioning)
    for row in range(3):
        alone = loaded.denoise(latents[[row]], times[[row]], conditioning[[row]])
        assert torch.equal(together[[row]], alone)
    other = loaded.encode(PROMPTS[::-1])
    assert not torch.equal(loaded.denoise(latents[:2], times[:2], other), together[:2])


def test_a_prompt_is_cut_where_diffusers_cuts_it(model_folder, loaded):
    long = "a red rabbit " * 60
    with torch.no_grad():
        (expected,), _ = pipeline_of(model_folder).encode_prompt(long, do_classifier_free_guidance=False)
        (states,) = loaded.encode([long]).states
    assert len(states) == len(expected) == TEXT_TOKENS
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    assert loaded.encode.cut(PROMPTS) == ""
    told = loaded.encode.cut([*PROMPTS, long])  # 6 tokens before the prompt, 13 after it
    assert "has 799 tokens of at most 512 and is read up to '...a red rabbit a red rabbit a red rabbit'" in told


# --- training


@torch.no_grad()
def test_hidden_neurons_of_a_trained_network_are_measured_and_get_the_bases_weights_back(loaded):
    """They are what w2 reads: the gate, silu of w1, times w3."""
    weights = loaded.adapt(PolicySettings(train="full"), seed=0)
    layers = policy_layers(weights)
    assert len(layers) == 4  # two blocks, and one refiner each for noise and text
    for parameter in weights.parameters.values():
        parameter += 0.1
    layer, given = loaded.network.layers[1].feed_forward, []
    handle = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with handle, ActivationRecorder(layers) as recorder:
        loaded.denoise(drawn(2), torch.tensor([500.0, 20.0]), loaded.encode(PROMPTS))
    x = torch.cat([tokens.flatten(0, 1) for tokens in given])
    gate, value = x @ layer.w1.weight.T, x @ layer.w3.weight.T
    mean = (gate * gate.sigmoid() * value).relu().mean(0)
    scores = recorder.scores()["layers.1.feed_forward"]
    torch.testing.assert_close(scores, mean / mean.mean(), rtol=1e-4, atol=1e-4)  # float32 sums in another order
    masks = {name: torch.zeros(len(scores), dtype=torch.bool) for name in layers}
    masks["layers.1.feed_forward"][3] = True
    reset_neurons(layers, masks, torch.optim.SGD(weights.parameters.values()), torch.Generator())
    for name, neurons in (("w1", 0), ("w3", 0), ("w2", 1)):
        base = weights.base[f"layers.1.feed_forward.{name}.weight"]
        back = (getattr(layer, name).weight == base).all(1 - neurons)
        assert back.tolist() == masks["layers.1.feed_forward"].tolist()


# --- LoRA files


def test_a_lora_of_true_size_is_on_every_block():
    """Without memory; ComfyUI's names for these layers are in test_native."""
    config = json.loads((SHIPPED / "z-image" / "transformer" / "config.json").read_text())
    attention = [f"attention.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    ends = {"attention": attention, "attention+feed-forward": [*attention, *(f"feed_forward.w{n}" for n in (1, 2, 3))]}
    blocks = [
        *(f"layers.{n}" for n in range(30)),
        *(f"{part}_refiner.{n}" for part in ("noise", "context") for n in (0, 1)),
    ]
    for targets, modules in LORA_MODULES.items():
        with init_empty_weights():
            network = ZImageTransformer2DModel.from_config(config)
        TransformerLora(network, 1, 1.0, modules, seed=0)
        found = {name.partition(".lora_A")[0] for name, _ in network.named_parameters() if ".lora_A" in name}
        assert found == {f"{block}.{end}" for block in blocks for end in ends[targets]}, targets


# --- folders, hub ids and files


def test_a_text_encoder_that_was_saved_with_its_head_loads_without_it(loaded, folder):
    """As the published ones are: Qwen3ForCausalLM's names have a level more."""
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"model.{name}": weight for name, weight in load_file(path).items()}
    save_file(weights | {"lm_head.weight": torch.zeros(280, 16)}, path)
    got = load_model(str(folder), torch.float32)
    assert all(map(torch.equal, got.encode(PROMPTS).states, loaded.encode(PROMPTS).states))


def test_a_tokenizer_without_a_template_is_named(folder):
    for file in (folder / "tokenizer").glob("chat_template*"):
        file.unlink()
    with pytest.raises(ValueError, match="has a tokenizer without a chat template; expected that of Qwen3"):
        load_model(str(folder), torch.float32)


# --- single files


FILES = ("native", "native with a prefix", "of diffusers", "float8", "all in one")


@pytest.fixture
def file(folder, monkeypatch, request) -> Path:
    """A file in the folder, which lacks what the file holds; what it would ship if Z-Image were tiny is its own."""
    configs = folder.parent / "configs"
    for part in ("transformer", "text_encoder", "vae"):
        (configs / "z-image" / part).mkdir(parents=True)
        shutil.copy(folder / part / "config.json", configs / "z-image" / part)
    monkeypatch.setattr(shipped, "CONFIGS", configs)
    parts = pipeline_of(folder).components
    weights = z_image_to_native(parts["transformer"])
    if request.param == "of diffusers":
        weights = parts["transformer"].state_dict()
    if request.param == "float8":  # the codes of what is twice as large
        name = "layers.0.attention.qkv.weight"
        weights[name] = (2 * weights[name]).to(torch.float8_e4m3fn)
        weights |= {"layers.0.attention.qkv.scale_weight": torch.tensor(0.5), "scaled_fp8": torch.zeros(2)}
    if request.param in ("native with a prefix", "all in one"):
        weights = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
    if request.param == "all in one":
        text = parts["text_encoder"].state_dict()
        weights |= {f"text_encoders.qwen3_4b.transformer.model.{name}": weight for name, weight in text.items()}
        weights |= {f"vae.{name}": weight for name, weight in vae_to_ldm(parts["vae"]).items()}
        for part in ("text_encoder", "vae"):
            shutil.rmtree(folder / part)
    shutil.rmtree(folder / "transformer")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "mine.safetensors")
    return folder / "mine.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("file", FILES, indirect=True)
def test_a_file_in_the_folder_is_the_folders_model(loaded, file, request):
    model = load_model(str(file), torch.float32)
    rounded = "float8" in request.node.name
    assert model.networks.keys() == loaded.networks.keys()
    for name, network in model.networks.items():
        expected = loaded.networks[name].state_dict()
        assert network.state_dict().keys() == expected.keys()
        for key, weight in network.state_dict().items():
            codes = rounded and key.startswith("layers.0.attention.to_") and "to_out" not in key
            assert torch.equal(weight, expected[key]) != codes, key
            # float8 has 3 bits after the first
            torch.testing.assert_close(weight, expected[key], rtol=2**-4 if codes else 0, atol=2**-10 if codes else 0)
    assert all(map(torch.equal, model.encode(PROMPTS).states, loaded.encode(PROMPTS).states))
    assert outline(str(file)) == (FlowSchedule(3.0), "flow-ddim", 2, 2, shipped.CONFIGS / "z-image", ())
    assert make_config(overrides={"model": str(file)}).steps == make_config("z-image-turbo").steps


@pytest.mark.parametrize("file", ["all in one"], indirect=True)
def test_a_file_alone_asks_for_the_folder(file, tmp_path):
    alone = tmp_path / "elsewhere" / "mine.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="of Z-Image, and neither .* has tokenizer, scheduler; expected"):
        load_model(str(alone), torch.float32)


@pytest.mark.parametrize(
    ("file", "missing", "message"),
    [
        (
            "native",
            "layers.1.feed_forward.w2.weight",
            "lacks 1 weight of the ZImageTransformer2DModel, the first is layers.1.feed",
        ),
        (
            "all in one",
            "vae.decoder.up.1.upsample.conv.bias",
            "lacks .*conv.bias; expected .*; download the model",
        ),
    ],
    indirect=["file"],
)
def test_a_file_that_lacks_a_weight_is_named(file, missing, message):
    weights = load_file(file)
    del weights[missing]
    save_file(weights, file)
    with pytest.raises(ValueError, match=message):
        load_model(str(file), torch.float32)


def test_lumina_2_is_named(tmp_path):
    names = ["noise_refiner.0.attention.qkv.weight", "cap_embedder.1.weight", "layers.0.attention.qkv.weight"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "lumina.safetensors")
    with pytest.raises(ValueError, match="is Lumina; expected"):
        load_model(str(tmp_path / "lumina.safetensors"), torch.float32)
