"""Loading: every source gives the same components, and every file that is something else gives one clear ValueError."""

import codecs
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_models import MODEL, SHIPPED, edited, make_tiny_model
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from comfy_tdpo.models import diffusers_folder, shipped
from comfy_tdpo.models.components import Components, load_components

LAST_NORM = f"{MODEL}output_blocks.11.1.transformer_blocks.0.norm1.bias"

PROMPTS = [
    "a green colored rabbit",
    "WOW!! it's the cat's pyjamas!",
    "Four wolves, 3.14 cafés naïve 日本",
    "",
    "a " * 99,
]

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def models(configs, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Of each family a diffusers folder and a single file with the same random weights."""
    return {family: make_tiny_model(tmp_path_factory.mktemp(family), configs / family) for family in ("sd1", "sd2")}


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A copy of the SD 1.x folder, to be spoiled."""
    return shutil.copytree(models["sd1"][0], tmp_path / "model")


# --- the sources agree


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_single_file_and_folder_are_one_model(models, family):
    folder, single = (load_components(str(path)) for path in models[family])
    for name in ("unet", "vae", "text_encoder"):
        expected, got = getattr(folder, name).state_dict(), getattr(single, name).state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    stored = load_file(models[family][0] / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == single.unet.state_dict().keys()
    assert all(torch.equal(stored[key].float(), weight) for key, weight in single.unet.state_dict().items())
    for expected, got in zip(outputs(folder), outputs(single), strict=True):
        assert torch.equal(expected, got) and got.isfinite().all() and got.std() > 0


def outputs(parts: Components) -> list[torch.Tensor]:
    tokens = torch.tensor([[49_406, 320, 2_368, *[49_407] * 74]])  # "a cat"
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    states = parts.text_encoder(tokens).last_hidden_state  # (1, 77, D)
    return [states, parts.unet(latents, 500, states).sample, parts.vae.decode(latents).sample]


def test_half_precision_evaluation_mode_and_no_gradients(models):
    for path in models["sd1"]:
        parts = load_components(str(path), torch.bfloat16)
        for network in (parts.unet, parts.vae, parts.text_encoder):
            assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
            assert not network.training and not any(weight.requires_grad for weight in network.parameters())
        assert parts.source == str(path)


def test_weights_do_not_hang_on_the_file(models, tmp_path):
    copy = Path(shutil.copy(models["sd1"][1], tmp_path / "model.safetensors"))
    parts = load_components(str(copy), torch.float16)  # the dtype on disk: no conversion forces a copy
    before = parts.unet.conv_in.weight.clone()
    copy.write_bytes(bytes(copy.stat().st_size))
    assert torch.equal(parts.unet.conv_in.weight, before)


def test_the_text_encoder_of_sd_turbos_file_has_another_name(models, tmp_path):
    """SD-Turbo is an SD 2.1, in a file of the code that SDXL came with."""

    def rename(weights):
        for key in [key for key in weights if key.startswith("cond_stage_model.")]:
            weights[key.replace("cond_stage_model.", "conditioner.embedders.0.")] = weights.pop(key)

    got = load_components(edited(models["sd2"][1], tmp_path / "turbo.safetensors", rename))
    expected = load_components(str(models["sd2"][1]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(expected.text_encoder.parameters(), got.text_encoder.parameters(), strict=True)
    )


def test_a_folder_of_fp16_variants_loads(models, folder):
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    expected, got = load_components(str(models["sd1"][0])), load_components(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(expected.unet.parameters(), got.unet.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected.vae.parameters(), got.vae.parameters(), strict=True))


def test_an_old_merge_without_the_level_text_model_loads(models, tmp_path):
    def drop(weights):
        for key in [key for key in weights if ".text_model." in key]:
            weights[key.replace(".text_model.", ".")] = weights.pop(key)

    got = load_components(edited(models["sd1"][1], tmp_path / "old.safetensors", drop)).text_encoder
    expected = load_components(str(models["sd1"][0])).text_encoder
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), got.parameters(), strict=True))


# --- the shipped facts


@pytest.mark.parametrize(
    ("family", "unet", "text_encoder"),
    [
        ("sd1", 859_520_964, 123_060_480),
        ("sd2", 865_910_724, 340_387_840),
        ("sdxl", 2_567_463_684, 123_060_480),
    ],
)
def test_shipped_configurations_have_the_published_sizes(family, unet, text_encoder):
    def count(make, name: str) -> int:
        with init_empty_weights():
            return sum(weight.numel() for weight in make(SHIPPED / family / name).parameters())

    def text(path: Path) -> CLIPTextModel:
        return CLIPTextModel(CLIPTextConfig.from_pretrained(path))

    assert count(lambda path: UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path)), "unet") == unet
    assert count(lambda path: AutoencoderKL.from_config(AutoencoderKL.load_config(path)), "vae") == 83_653_863
    assert count(text, "text_encoder") == text_encoder
    if family == "sdxl":
        second = CLIPTextConfig.from_pretrained(SHIPPED / family / "text_encoder_2")
        assert count(lambda path: CLIPTextModelWithProjection(second), "") == 694_659_840


@pytest.mark.parametrize(
    ("name", "cls", "size"),
    [
        ("vae", AutoencoderKL, 83_819_683),
        ("text_encoder", CLIPTextModelWithProjection, 123_650_304),
        ("text_encoder_2", CLIPTextModelWithProjection, 694_659_840),
        ("text_encoder_3", T5EncoderModel, 4_762_310_656),
    ],
)
def test_the_shipped_parts_of_sd3_have_the_published_sizes(name, cls, size):
    network = diffusers_folder.empty_network(SHIPPED / "sd3" / name, cls)
    # T5's tokens have two names, and are one weight
    assert sum(w.numel() for key, w in network.named_parameters() if key != "encoder.embed_tokens.weight") == size


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("sd1", "tokenizer"), ("sd2", "tokenizer"), ("sdxl", "tokenizer"), ("sdxl", "tokenizer_2")),
        *(("sd3", "tokenizer"), ("sd3", "tokenizer_2")),
    ],
)
def test_tokens_are_open_clips(family, name):
    tokenizer = shipped.clip_tokenizer(SHIPPED / family, name)
    got = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids  # (B, 77)
    expected = open_clip.tokenize(PROMPTS)  # padded with 0, which is "!"
    end = 49_407
    if family == "sd1" or (family != "sd2" and name == "tokenizer"):  # padded with the end token
        expected[expected.argmax(dim=1)[:, None] < torch.arange(77)] = end
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2-v", "sdxl"])
def test_a_single_files_schedule_is_stable_diffusions(family):
    config = json.loads((SHIPPED / family / "scheduler" / "scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[-1] == 1  # steps_offset 1: the last sigma is 0.02065
    now, last = scheduler.alphas_cumprod[1], scheduler.final_alpha_cumprod
    assert ((1 - last) / (1 - now) * (1 - now / last)).sqrt().item() == pytest.approx(0.02065, abs=5e-6)


# --- how a model predicts


@pytest.mark.parametrize(("spread", "expected"), [(0.05, "epsilon"), (0.15, "v_prediction")])
def test_a_silent_sd2_file_predicts_as_comfyui_takes_it(models, tmp_path, caplog, spread, expected):
    def spread_out(weights):
        weights[LAST_NORM] = torch.tensor([-spread, spread]).repeat(16).half()  # standard deviation `spread`

    path = edited(models["sd2"][1], tmp_path / "silent.safetensors", spread_out)
    assert load_components(path).scheduler.config.prediction_type == expected
    assert "set prediction_type to override" in caplog.text


@pytest.mark.parametrize(
    ("key", "word", "expected", "size"),
    [
        ("modelspec.prediction_type", "v", "v_prediction", 96),
        ("modelspec.prediction_type", "epsilon", "epsilon", 64),
        ("modelspec.predict_key", "v", "v_prediction", 96),
    ],
)
def test_a_files_own_word_counts(models, tmp_path, key, word, expected, size):
    path = edited(models["sd2"][1], tmp_path / "said.safetensors", lambda weights: None, {key: word})
    parts = load_components(path)
    assert (parts.scheduler.config.prediction_type, parts.unet.config.sample_size) == (expected, size)
    assert load_components(path, prediction_type="sample").scheduler.config.prediction_type == "sample"


def test_the_argument_overrides_a_folder_and_is_checked(models):
    path = str(models["sd1"][0])
    assert load_components(path).scheduler.config.prediction_type == "epsilon"
    assert load_components(path, prediction_type="v_prediction").scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="prediction_type is 'v'; expected one of epsilon"):
        load_components(path, prediction_type="v")


def test_a_legacy_folder_keeps_its_own_schedule(folder):
    config = {"_class_name": "PNDMScheduler", "beta_start": 0.001, "beta_end": 0.013, "beta_schedule": "scaled_linear"}
    config |= {"skip_prk_steps": True, "steps_offset": 0, "clip_sample": True, "set_alpha_to_one": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = load_components(str(folder)).scheduler
    assert isinstance(scheduler, DDIMScheduler) and not scheduler.config.clip_sample
    assert (scheduler.config.steps_offset, scheduler.config.set_alpha_to_one) == (0, True)
    assert scheduler.betas[[0, -1]].tolist() == pytest.approx([0.001, 0.013])


# --- the hub


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The place of "owner/name" in a hub cache that holds nothing yet; offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "hub" / "models--owner--name", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def test_a_cached_hub_id_loads_offline(models, cached):
    shutil.copytree(models["sd1"][0], cached)
    parts = load_components("owner/name")
    assert parts.source == "owner/name"
    assert torch.equal(parts.unet.conv_in.weight, load_components(str(models["sd1"][0])).unet.conv_in.weight)


def test_a_hub_id_of_another_pipeline_is_named_before_its_weights_are_fetched(cached, monkeypatch):
    monkeypatch.setattr(
        diffusers_folder.StableDiffusionPipeline, "download", lambda *args, **kwargs: pytest.fail("fetched")
    )
    cached.mkdir(parents=True)
    (cached / "model_index.json").write_text(
        json.dumps({"_class_name": "QwenImagePipeline", "vae": ["diffusers", "V"]})
    )
    with pytest.raises(ValueError, match=r"is Qwen-Image \(QwenImagePipeline\)"):
        load_components("owner/name")


def test_a_hub_id_that_cannot_be_had_is_an_error(cached):
    with pytest.raises(
        ValueError, match="'owner/name' is not a file or folder here.*cannot be downloaded.*HF_HUB_OFFLINE"
    ):
        load_components("owner/name")


# --- everything else


@pytest.mark.parametrize("model", ["/nowhere/model.safetensors", "nowhere/model.safetensors", "nowhere", "./a/b"])
def test_a_missing_path_is_an_error(model):
    with pytest.raises(ValueError, match=f"no file or folder '{model}'; expected Stable Diffusion"):
        load_components(model)


def test_a_pickle_is_an_error(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="model.ckpt is not a .safetensors file; expected .*; convert it"):
        load_components(str(tmp_path / "model.ckpt"))


@pytest.mark.parametrize("kept", [0, 100, 100_000])
def test_a_truncated_file_is_an_error(models, tmp_path, kept):
    path = tmp_path / "short.safetensors"
    path.write_bytes(models["sd1"][1].read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"short.safetensors \({kept} bytes\) is not a valid .*download it again"):
        load_components(str(path))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
        (["unet.up_blocks.0.attn1.processor.to_q.lora.down.weight"], "a LoRA"),
        (["conditioner.embedders.1.model.ln_final.bias", f"{MODEL}input_blocks.0.0.weight"], "an SDXL checkpoint"),
        ([f"{MODEL}joint_blocks.0.context_block.attn.qkv.weight"], "an SD 3 checkpoint without its whole"),
        (["double_blocks.0.img_attn_k_norm.weight"], "a checkpoint with the blocks of FLUX.1"),
        (["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"], "Flux 2"),
        (["double_blocks.0.img_attn.qkv.lora_A.weight"], "a LoRA"),
        (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.norms.0.scale"], "Chroma"),
        ([f"{MODEL}transformer_blocks.0.img_mod.1.weight"], "Qwen-Image"),
        (["t_block.1.weight"], "PixArt"),
        (["blocks.0.self_attn.q.weight", "head.modulation"], "Wan"),
        (["down_blocks.0.0.depthwise.weight", "clip_txt_mapper.weight"], "Stable Cascade"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one component of a diffusers folder"),
        (["control_model.time_embed.0.weight"], "a ControlNet"),
        (["first_stage_model.decoder.conv_in.weight"], "something else: keys like first_stage_model.decoder"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, keys, what):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors is {what}.*; expected Stable Diffusion"):
        load_components(str(tmp_path / "model.safetensors"))


def test_an_image_conditioned_unet_is_an_error(models, tmp_path):
    path = edited(
        models["sd2"][1],
        tmp_path / "unclip.safetensors",
        lambda w: w.update({f"{MODEL}label_emb.0.0.bias": torch.zeros(4)}),
    )
    with pytest.raises(ValueError, match="class or image conditions"):
        load_components(path)


def test_inpainting_is_an_error(models, tmp_path, folder):
    def widen(weights):
        weights[f"{MODEL}input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)

    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    for path in (str(folder), edited(models["sd1"][1], tmp_path / "inpaint.safetensors", widen)):
        with pytest.raises(ValueError, match="takes 9 channels .inpainting.*expected the 4"):
            load_components(path)


def test_a_unet_of_another_width_is_an_error(models, tmp_path):
    key = f"{MODEL}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    path = edited(models["sd1"][1], tmp_path / "wide.safetensors", lambda w: w.update({key: torch.zeros(32, 40)}))
    with pytest.raises(ValueError, match="has width 32 and text width 40"):
        load_components(path)


@pytest.mark.parametrize(
    ("part", "network"),
    [
        ("first_stage_model.", "AutoencoderKL"),
        ("cond_stage_model.", "CLIPTextModel"),
        (f"{MODEL}out.2.bias", "UNet2DConditionModel"),
    ],
)
def test_a_missing_weight_is_an_error(models, tmp_path, part, network):
    def drop(weights):
        for key in [key for key in weights if key.startswith(part)]:
            del weights[key]

    path = edited(models["sd1"][1], tmp_path / "part.safetensors", drop)
    with pytest.raises(ValueError, match=rf"part.safetensors lacks \d+ weights? of the {network}, the first is .*exp"):
        load_components(path)


def test_a_missing_weight_that_diffusers_trips_over_is_an_error(models, tmp_path):
    path = edited(
        models["sd1"][1], tmp_path / "part.safetensors", lambda w: w.pop(f"{MODEL}output_blocks.5.2.conv.bias")
    )
    with pytest.raises(ValueError, match="part.safetensors lacks output_blocks.5.2.conv.bias; expected"):
        load_components(path)


def test_a_weight_of_another_shape_is_an_error(models, tmp_path):
    key = "first_stage_model.post_quant_conv.bias"
    path = edited(models["sd1"][1], tmp_path / "odd.safetensors", lambda w: w.update({key: torch.zeros(5)}))
    with pytest.raises(ValueError, match=r"post_quant_conv.bias of the AutoencoderKL in .* is \(5,\), not \(4,\)"):
        load_components(path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model_index.json", "lacks model_index.json"),
        ("unet/config.json", "lacks unet/config.json"),
        ("vae/config.json", "lacks vae/config.json"),
        ("scheduler/scheduler_config.json", "lacks scheduler/scheduler_config.json"),
        ("tokenizer/*", "lacks tokenizer/vocab.json"),
        ("vae/diffusion_pytorch_model.safetensors", "has no weights as .safetensors .*got config.json.; convert"),
    ],
)
def test_an_incomplete_folder_is_an_error(folder, lost, message):
    for path in folder.glob(lost):
        path.unlink()
    with pytest.raises(ValueError, match=message):
        load_components(str(folder))


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_a_folder_with_a_lost_weight_or_a_cut_file_is_an_error(folder, name):
    path = folder / f"{name}.safetensors"
    weights = load_file(path)
    lost = sorted(weights)[-1]
    save_file({key: weight for key, weight in weights.items() if key != lost}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weight of the .*, the first is {lost}"):
        load_components(str(folder))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not a valid .safetensors file"):
        load_components(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "C"]},
            "is a StableDiffusionXLPipeline whose text_encoder_2 is C, not CLIPTextModelWithProjection",
        ),
        ({"_class_name": "MinePipeline", "unet": None}, "is a MinePipeline whose unet is None, not UNet2D"),
        (
            {"_class_name": "Flux2KleinPipeline", "unet": None},
            "is Flux 2 .Flux2KleinPipeline.; expected Stable .*; nearest to it is FLUX.1$",
        ),
        ({"_class_name": "QwenImagePipeline", "unet": None}, "is Qwen-Image .QwenImagePipeline.; expected Stable"),
        ({"_class_name": "ChromaPipeline", "unet": None}, "is Chroma .ChromaPipeline.; expected Stable"),
        ({"_class_name": "PixArtSigmaPipeline", "unet": None}, "is PixArt .PixArtSigmaPipeline.; expected Stable"),
        ({"_class_name": "WanPipeline", "unet": None}, "is Wan .WanPipeline.; expected .* is none for video; for imag"),
        ({"_class_name": "StableCascadeCombinedPipeline", "unet": None}, "is Stable Cascade .Sta.* Diffusion XL$"),
        ({"vae": ["diffusers", "ConsistencyDecoderVAE"]}, "whose vae is ConsistencyDecoderVAE, not AutoencoderKL"),
    ],
)
def test_another_pipelines_folder_is_an_error(folder, changes, message):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_components(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\xff"])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_folder_with_damaged_json_is_named(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{name} .*again"):
        load_components(str(folder))


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_named(folder):
    edited_config = json.loads((folder / "text_encoder" / "config.json").read_text()) | {"vocab_size": 100}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(edited_config))
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    save_file(weights | {name: weights[name][:100].clone()}, folder / "text_encoder" / "short.safetensors")
    (folder / "text_encoder" / "short.safetensors").replace(folder / "text_encoder" / "model.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer of \d+ tokens and a text encoder of 100; .* the same model"):
        load_components(str(folder))


def test_json_with_a_byte_order_mark_is_read(folder):
    for path in [folder / "model_index.json", *folder.glob("*/config.json"), *folder.glob("scheduler/*.json")]:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    load_components(str(folder))


def test_shards_without_their_list_are_named(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    with pytest.raises(ValueError, match="without diffusion_pytorch_model.safetensors.index.json, which lists them"):
        load_components(str(folder))


@pytest.mark.parametrize("part", [3, "AutoencoderKL2", [], {}, ["diffusers"], [None]])
def test_an_index_with_odd_parts_is_an_error(folder, part):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": part}))
    with pytest.raises(ValueError, match="whose vae is"):
        load_components(str(folder))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"down_block_types": ["NoSuchBlock"] * 4}),
        ("vae/config.json", {"block_out_channels": [7]}),
        ("text_encoder/config.json", {"hidden_size": "large"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "no such schedule"}),
    ],
)
def test_a_configuration_that_makes_no_model_is_named(folder, name, changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"{name.split('/')[0]}.* cannot be loaded"):
        load_components(str(folder))


def test_key_weights_without_their_dimensions_are_an_error(models, tmp_path):
    key = f"{MODEL}input_blocks.0.0.weight"
    path = edited(models["sd1"][1], tmp_path / "flat.safetensors", lambda w: w.update({key: torch.zeros(32)}))
    with pytest.raises(ValueError, match=r"flat.safetensors has a U-Net whose first weights have the shapes \[\(32,\)"):
        load_components(path)
