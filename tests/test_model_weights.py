"""Weights are loaded with the values they represent, or the model is rejected with a message that names the fault."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODEL, edited, make_tiny_model

from comfy_tdpo.models.components import Components, load_components

PARTS = ("unet", "vae", "text_encoder")
LINEAR = f"{MODEL}input_blocks.1.1.transformer_blocks.0.attn1.to_q"  # a layer of the original layout
UNET = "unet/diffusion_pytorch_model.safetensors"
FLOAT8 = torch.float8_e4m3fn

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def model(configs, tmp_path_factory) -> tuple[Path, Path]:
    """SD 1.x with random weights as a diffusers folder and as a single file."""
    return make_tiny_model(tmp_path_factory.mktemp("sd1"), configs / "sd1")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A copy of the folder, to be changed."""
    return shutil.copytree(model[0], tmp_path / "model")


@pytest.fixture
def single(model, tmp_path):
    """A changed copy of the single file."""
    return lambda change, metadata=None: edited(model[1], tmp_path / "single.safetensors", change, metadata)


def change_part(folder: Path, name: str, change, metadata: dict | None = None) -> str:
    edited(folder / name, folder / "changed", change, metadata)
    (folder / "changed").rename(folder / name)
    return str(folder)


def same(got: Components, expected: Components) -> bool:
    pairs = [(getattr(got, part).state_dict(), getattr(expected, part).state_dict()) for part in PARTS]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


# --- float8 with scales: the truth is the code times its scale


def to_float8(weights: dict, scale_name: str, rows: bool = False, extra: dict | None = None) -> dict:
    """Store the matrices of attention in `weights` in float8 with scales; what they stand for, by name."""
    stand_for = {}
    for key in [key for key in weights if key.endswith(("to_q.weight", "to_k.weight"))]:
        weight, layer = weights[key].float(), key.removesuffix(".weight")
        scale = weight.abs().amax(1) / 448 if rows else weight.abs().max() / 448
        codes = (weight / (scale[:, None] if rows else scale)).to(FLOAT8)
        weights |= {key: codes, f"{layer}.{scale_name}": scale}
        weights |= {f"{layer}.{name}": value.clone() for name, value in (extra or {}).items()}
        stand_for[key] = codes.double() * (scale[:, None] if rows else scale).double()
    assert stand_for
    return stand_for


COMFY_QUANT = torch.tensor(list(b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'), dtype=torch.uint8)
SCALED = {
    "scaled_fp8": ("scale_weight", False, {"scale_input": torch.ones(())}),
    "comfy_quant": ("weight_scale", False, {"comfy_quant": COMFY_QUANT, "input_scale": torch.ones(())}),
    "one scale for each row": ("weight_scale", True, {}),
}


@pytest.mark.parametrize("scheme", SCALED)
def test_scaled_float8_is_multiplied_out(folder, single, scheme):
    scale_name, rows, extra = SCALED[scheme]
    expected = {}

    def scale(weights, prefix=""):
        weights[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=FLOAT8)
        expected.update(to_float8(weights, scale_name, rows, extra))

    def unet_key(key: str) -> torch.Tensor:
        return unet.state_dict()[key].double()

    unet = load_components(change_part(folder, UNET, scale)).unet
    for key, weight in expected.items():
        torch.testing.assert_close(unet_key(key), weight, rtol=6e-8, atol=0)  # one float32 product
    expected.clear()
    unet = load_components(single(lambda weights: scale(weights, MODEL))).unet
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(unet_key(key), expected[f"{LINEAR}.weight"], rtol=6e-8, atol=0)


def test_a_header_may_name_the_format(folder):
    expected, layers = {}, {}

    def scale(weights):
        expected.update(to_float8(weights, "weight_scale"))
        layers.update({key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in expected})

    change_part(folder, UNET, scale)
    change_part(folder, UNET, lambda w: None, {"_quantization_metadata": json.dumps({"layers": layers})})
    unet = load_components(str(folder)).unet
    for key, weight in expected.items():
        torch.testing.assert_close(unet.state_dict()[key].double(), weight, rtol=6e-8, atol=0)
    layers[next(iter(layers))]["format"] = "nvfp4"
    change_part(folder, UNET, lambda w: None, {"_quantization_metadata": json.dumps({"layers": layers})})
    with pytest.raises(ValueError, match="is quantised in a way that cannot be trained: nvfp4 .*; choose"):
        load_components(str(folder))


def test_scales_apply_to_the_text_encoder_and_the_autoencoder(folder):
    expected = {}

    def scale(weights):
        key = next(key for key in sorted(weights) if key.endswith(".weight") and weights[key].ndim == 2)
        weights |= {key: weights[key].to(FLOAT8), f"{key}_scale": torch.tensor(0.5)}
        expected[key.removeprefix("text_model.")] = weights[key].float() / 2

    change_part(folder, "vae/diffusion_pytorch_model.safetensors", scale)
    parts = load_components(change_part(folder, "text_encoder/model.safetensors", scale))
    found = parts.vae.state_dict() | {
        key.removeprefix("text_model."): weight for key, weight in parts.text_encoder.state_dict().items()
    }
    assert len(expected) == 2 and all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_float8_without_scales_is_only_cast(folder, single):
    def cast(weights):
        weights |= {key: w.to(FLOAT8) for key, w in weights.items() if w.is_floating_point()}

    for part in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        change_part(folder, part, cast)
    expected = {key: weight.float() for key, weight in load_file(folder / UNET).items()}
    got = load_components(str(folder))
    assert all(torch.equal(got.unet.state_dict()[key], weight) for key, weight in expected.items())
    assert same(load_components(single(cast)), got)


QUANTISED = {
    "bitsandbytes in 4 bits .*absmax": {"weight.absmax": torch.ones(4), "weight": torch.zeros(512, 1).byte()},
    "bitsandbytes in 4 bits .*nf4": {"weight.quant_state.bitsandbytes__nf4": torch.zeros(9).byte()},
    "bitsandbytes in 8 bits .*SCB": {"SCB": torch.ones(32), "weight": torch.zeros(32, 32).char()},
    "bitsandbytes in 8 bits .*weight_format": {"weight_format": torch.zeros(()).byte()},
    "GPTQ or AWQ": {"qweight": torch.zeros(4, 4).int()},
    "Quanto": {"weight._data": torch.zeros(32, 32).char(), "weight._scale": torch.ones(32)},
    "ModelOpt": {"weight_quantizer._scale": torch.ones(())},
    "nvfp4": {
        "weight": torch.zeros(32, 16).byte(),
        "weight_scale": torch.ones(32, 2).to(FLOAT8),
        "weight_scale_2": torch.ones(()),
    },
    "mxfp8": {
        "weight": torch.zeros(32, 32).to(FLOAT8),
        "weight_scale": torch.ones(32, 1).byte(),
        "comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8),
    },
    "a scale of uint8 .32, 1. for a weight of float8": {
        "weight": torch.zeros(32, 32).to(FLOAT8),
        "weight_scale": torch.ones(32, 1).byte(),
    },
    "a scale of float32 .4, 4. for a weight of float8": {
        "weight": torch.zeros(32, 32).to(FLOAT8),
        "weight_scale": torch.ones(4, 4),
    },
    "to_q.weight is stored as int8": {"weight": torch.zeros(32, 32).char(), "weight_scale": torch.ones(())},
    "a scale of float32 .. for a weight of float16": {"scale_weight": torch.tensor(2.0)},
    "an unknown scheme with scales .*scale_inv": {"weight_scale_inv": torch.ones(1, 1)},
    "an unknown scheme with scales .*own_scale": {"my_own_scale": torch.ones(1, 1)},
    "scale_weight has no ": {"lost.scale_weight": torch.ones(())},
    "without .*weight_scale": {"weight": torch.zeros(32, 32).to(FLOAT8), "comfy_quant": COMFY_QUANT},
    "a description of its format": {"comfy_quant": torch.zeros(5).byte()},
}


@pytest.mark.parametrize("reason", QUANTISED)
def test_another_quantisation_is_refused_by_name(folder, single, reason):
    def add(weights, layer):
        weights |= {f"{layer}.{name}": value for name, value in QUANTISED[reason].items()}

    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    change_part(folder, UNET, lambda weights: add(weights, layer))
    for path in (str(folder), single(lambda weights: add(weights, LINEAR))):
        with pytest.raises(ValueError, match=f"safetensors is quantised .*{reason}.*; choose the model's fp16"):
            load_components(path)


def test_a_configuration_that_says_quantised_is_believed(folder):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(ValueError, match="is quantised .*torchao"):
        load_components(str(folder))


# --- weights that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "key", "stored", "network"),
    [
        (UNET, "conv_out.bias", f"{MODEL}out.2.bias", "UNet2DConditionModel"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.conv_in.bias",
            "first_stage_model.decoder.conv_in.bias",
            "AutoencoderKL",
        ),
        (
            "text_encoder/model.safetensors",
            "final_layer_norm.bias",
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "CLIPTextModel",
        ),
    ],
)
def test_a_weight_that_is_not_finite_is_named(folder, single, name, key, stored, network, value):
    def spoil(weights, end):
        (full,) = [name for name in weights if name.endswith(end)]
        weights[full][1] = value

    change_part(folder, name, lambda weights: spoil(weights, key))
    for path, file in ((str(folder), name), (single(lambda weights: spoil(weights, stored)), "single.safetensors")):
        message = rf"{key} of the {network} in .*{file} contains NaN or infinity \(1 of \d+ values\).*download it again"
        with pytest.raises(ValueError, match=message):
            load_components(path)


def test_a_weight_that_a_cast_makes_infinite_is_named(folder):
    def enlarge(weights):
        weights |= {key: weight.float() for key, weight in weights.items()}
        weights["conv_out.bias"][0] = 1e5  # float16 ends at 65504

    path = change_part(folder, UNET, enlarge)
    with pytest.raises(ValueError, match=r"conv_out.bias of the .* is too large for torch.float16; load .* fp32"):
        load_components(path, torch.float16)
    assert load_components(path, torch.bfloat16).unet.conv_out.bias[0] == 99_840  # 1e5 to eight bits


# --- what is in the file beside, before and after the weights


def test_bytes_after_the_last_tensor_do_no_harm(model, folder, single):
    path = Path(single(lambda weights: None))
    for file in (path, folder / UNET):
        with file.open("ab") as end:
            end.write(bytes(16))
    expected = load_components(str(model[0]))
    assert same(load_components(str(path)), expected) and same(load_components(str(folder)), expected)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_file_that_ends_early_is_an_unfinished_download(single, cut):
    path = Path(single(lambda weights: None))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"is not a valid .safetensors file: .* ends at byte .*unfinished download"):
        load_components(str(path))


@pytest.mark.parametrize(
    "stray", ["lora_unet_x.lora_down.weight", "label_emb.0.weight", "control_model.x", "down_blocks.x"]
)
def test_a_stray_key_makes_a_whole_checkpoint_nothing_else(model, single, stray):
    got = load_components(single(lambda weights: weights.update({stray: torch.zeros(1)})))
    assert same(got, load_components(str(model[1])))


def test_a_stray_key_does_not_name_another_kind_of_file(tmp_path):
    keys = [f"lora_unet_{n}.lora_down.weight" for n in range(9)] + ["double_blocks.0.img_attn.norm.key_norm.scale"]
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a LoRA"):
        load_components(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("prefix", ["state_dict.", "module.", "model.", "_orig_mod.", "module.state_dict."])
def test_a_prefix_before_every_key_is_taken_off(model, single, folder, prefix):
    def put_before(weights):
        for key in list(weights):
            weights[prefix + key] = weights.pop(key)

    expected = load_components(str(model[0]))
    assert same(load_components(single(put_before)), expected)
    for part in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        change_part(folder, part, put_before)
    assert same(load_components(str(folder)), expected)


def test_a_key_with_and_without_its_prefix_is_refused(single):
    def double(weights):
        for key in [key for key in weights if key.startswith(MODEL)]:
            weights[f"state_dict.{key}"] = weights.pop(key)
        weights["state_dict.first_stage_model.quant_conv.bias"] = torch.ones(8).half()

    with pytest.raises(ValueError, match="contains first_stage_model.quant_conv.bias twice.*; keep one"):
        load_components(single(double))


@pytest.mark.parametrize("prefix", ["", "state_dict."])
def test_averaged_weights_alone_are_taken(model, single, prefix):
    """As the authors' LitEma names them: without their dots."""

    def average(weights):
        for key in [key for key in weights if key.startswith(MODEL)]:
            weights[f"model_ema.{key.removeprefix('model.').replace('.', '')}"] = weights.pop(key)
        weights |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        for key in list(weights):
            weights[prefix + key] = weights.pop(key)

    assert same(load_components(single(average)), load_components(str(model[1])))


def test_weights_that_are_not_averaged_go_before_those_that_are(model, single):
    def add(weights):
        for key in [key for key in weights if key.startswith(MODEL)]:
            weights[f"model_ema.{key.removeprefix('model.').replace('.', '')}"] = torch.zeros_like(weights[key])

    assert same(load_components(single(add)), load_components(str(model[1])))


# --- folders as diffusers has saved them over the years


def test_shards_are_read_together(model, folder):
    weights = load_file(folder / UNET)
    names = sorted(weights)
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / "unet" / shard)
    (folder / UNET).unlink()
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert same(load_components(str(folder)), load_components(str(model[0])))
    (folder / "unet" / min(shards)).unlink()
    with pytest.raises(ValueError, match=f"lacks {min(shards)}"):
        load_components(str(folder))
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_components(str(folder))


def test_an_autoencoder_saved_before_2023_loads(model, folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        for key in [key for key in weights if "attentions" in key]:
            for new, name in old.items():
                if f".{new}." in key:
                    weights[key.replace(f".{new}.", f".{name}.")] = weights.pop(key)
        assert any(".proj_attn." in key for key in weights)

    change_part(folder, "vae/diffusion_pytorch_model.safetensors", rename)
    assert same(load_components(str(folder)), load_components(str(model[0])))


@pytest.mark.parametrize("factor", [float("nan"), 0, "0.18215"])
def test_a_scaling_factor_that_is_no_number_is_refused(folder, factor):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": factor}))
    with pytest.raises(ValueError, match="vae/config.json has scaling_factor .*expected a number above 0"):
        load_components(str(folder))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("time_cond_proj_dim", "is a whole latent consistency model .LCM., conditioned on the guidance"),
        ("num_class_embeds", "is conditioned on more than text and timestep"),
        ("addition_embed_type", "is conditioned on more than text and timestep"),
    ],
)
def test_a_unet_that_wants_more_than_text_is_refused(folder, condition, message):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {condition: 256}))
    with pytest.raises(ValueError, match=f"{message} .{condition} 256.; expected"):
        load_components(str(folder))
