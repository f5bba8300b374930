"""Tiny models of Stable Diffusion's true architectures, as diffusers folders and as files in the original layout.

The file in the original layout is made by benchmarks/full_architecture.py, whose table of names is written from the two
architectures and shares nothing with the conversion under test.
"""

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from comfy_tdpo.models import shipped

ROOT = Path(__file__).parent.parent
SHIPPED = shipped.CONFIGS
MODEL = "model.diffusion_model."

# Sizes that make a family's architecture tiny and leave its layout as it is, layer by layer.
TINY_UNET = {"block_out_channels": [32, 64, 64, 64]}
TINY_SIZES = {
    "sd1": {
        "unet": TINY_UNET | {"cross_attention_dim": 32},
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    },
    "sd2": {
        "unet": TINY_UNET | {"cross_attention_dim": 48, "attention_head_dim": [1, 2, 2, 2]},
        "text_encoder": {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4},
    },
}
TINY_SIZES["sd2-v"] = TINY_SIZES["sd2"]
TINY_SIZES["sdxl"] = {
    "unet": {
        "block_out_channels": [32, 32, 64],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 2, 4],
        "cross_attention_dim": 32 + 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
    "text_encoder": TINY_SIZES["sd1"]["text_encoder"],
    "text_encoder_2": TINY_SIZES["sd2"]["text_encoder"] | {"num_hidden_layers": 3, "projection_dim": 48},
}
TINY_SIZES["sd3"] = {
    "text_encoder": TINY_SIZES["sd1"]["text_encoder"] | {"hidden_size": 16, "projection_dim": 16},
    "text_encoder_2": TINY_SIZES["sd1"]["text_encoder"] | {"projection_dim": 32},
    "text_encoder_3": {"vocab_size": 32, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


def make_tiny_configs(folder: Path) -> Path:
    """The shipped configurations with tiny sizes, in `folder`."""
    shutil.copytree(SHIPPED, folder)
    for family, parts in TINY_SIZES.items():
        for part, sizes in (parts | {"vae": {"block_out_channels": [32, 32, 64, 64]}}).items():
            path = folder / family / part / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    return folder


def make_tiny_model(folder: Path, configs: Path) -> tuple[Path, Path]:
    """The same random weights in float16 as a diffusers folder and as a single file, in `folder`."""
    return runpy.run_path(str(ROOT / "benchmarks" / "full_architecture.py"))["make_models"](folder, configs)


def edited(source: Path, target: Path, change: Callable[[dict], object], metadata: dict | None = None) -> str:
    """`source` with its weights changed in place by `change`, as `target`."""
    weights = load_file(source)
    change(weights)
    save_file(weights, target, metadata)
    return str(target)


def change(path: Path, **values) -> None:
    """Change values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_tiny_sdxl(folder: Path, tokenizer, configs: Path) -> Path:
    """Stable Diffusion XL with random weights, as a diffusers folder; `tokenizer`, a small one, is read in a moment."""
    make_tiny_model(folder, configs / "sdxl")
    model = folder / "folder"
    for number in ("", "_2"):
        shutil.rmtree(model / f"tokenizer{number}")
        tokenizer.save_pretrained(model / f"tokenizer{number}")
        change(model / f"text_encoder{number}" / "config.json", eos_token_id=tokenizer.eos_token_id)
    return model


def make_tiny_sd3(folder: Path, tokenizer, with_t5: bool = True) -> Path:
    """Stable Diffusion 3.5 with random weights, as a diffusers folder; `tokenizer` is CLIP's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = _vae(scaling_factor=1.5305, shift_factor=0.0609)
        texts = [_clip(tokenizer, 16), _clip(tokenizer, 32), _t5() if with_t5 else None]
        _sd3_pipeline(vae, texts, [tokenizer, tokenizer]).save_pretrained(folder)
    return folder


def make_tiny_sd3_file(folder: Path, configs: Path) -> tuple[Path, dict[str, Tensor]]:
    """Stable Diffusion 3.5 with random weights, as a diffusers folder, and what a file with all of it holds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae"))
        texts: list = [
            CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(configs / name))
            for name in ("text_encoder", "text_encoder_2")
        ]
        texts.append(T5EncoderModel(T5Config.from_pretrained(configs / "text_encoder_3")))
        clips = [shipped.clip_tokenizer(configs, name) for name in ("tokenizer", "tokenizer_2")]
        pipeline = _sd3_pipeline(vae, texts, clips)
    pipeline.save_pretrained(folder)
    parts = {MODEL: sd3_to_native(pipeline.transformer), "first_stage_model.": vae_to_ldm(vae)}
    for name, text in zip(("clip_l", "clip_g", "t5xxl"), texts, strict=True):
        state = dict(text.state_dict())
        state.pop("encoder.embed_tokens.weight", None)  # the same as shared.weight
        parts[f"text_encoders.{name}.transformer."] = state
    return folder, {prefix + key: weight.contiguous() for prefix, part in parts.items() for key, weight in part.items()}


def _sd3_pipeline(vae: AutoencoderKL, texts: list, clip_tokenizers: list) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=64,
            joint_attention_dim=64,
            caption_projection_dim=128,
            pooled_projection_dim=48,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        vae=vae,
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        text_encoder_3=texts[2],
        tokenizer=clip_tokenizers[0],
        tokenizer_2=clip_tokenizers[1],
        tokenizer_3=_t5_tokenizer() if texts[2] else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


# The original names of a transformer of SD 3, written from the two architectures; first those of whole layers.
SD3_NAMES = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_JOINED = {  # three layers that are one in the original
    "x_block.attn.qkv": [f"attn.to_{part}" for part in "qkv"],
    "x_block.attn2.qkv": [f"attn2.to_{part}" for part in "qkv"],
    "context_block.attn.qkv": [f"attn.add_{part}_proj" for part in "qkv"],
}


def sd3_to_native(transformer: SD3Transformer2DModel) -> dict[str, Tensor]:
    """Its weights under the names of an original checkpoint, which has scale and shift of the last norms swapped."""
    state, native, last = transformer.state_dict(), {}, transformer.config.num_layers - 1
    for name, weight in state.items():
        block = re.match(r"transformer_blocks\.(\d+)\.", name)
        layer, _, kind = name[block.end() if block else 0 :].rpartition(".")
        place = f"joint_blocks.{block[1]}." if block else ""
        if name == "norm_out.linear." + kind or (block and int(block[1]) == last and layer == "norm1_context.linear"):
            weight = torch.cat(weight.chunk(2)[::-1])
        if name in SD3_NAMES:
            native[SD3_NAMES[name]] = weight
        elif layer in SD3_NAMES:
            native[f"{place}{SD3_NAMES[layer]}.{kind}"] = weight
        for joined, layers in SD3_JOINED.items():
            if layer == layers[0]:
                three = [state[f"{block[0]}{one}.{kind}"] for one in layers]
                native[f"{place}{joined}.{kind}"] = torch.cat(three)
    return native


def make_tiny_flux(folder: Path, tokenizer, guided: bool = True) -> Path:
    """FLUX.1 dev, or without guidance schnell, with random weights, as a diffusers folder; `tokenizer` is CLIP's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "transformer": FluxTransformer2DModel(
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=64,
                pooled_projection_dim=32,
                guidance_embeds=guided,
                axes_dims_rope=(4, 6, 6),
            ),
            "vae": _vae(scaling_factor=0.3611, shift_factor=0.1159),
            "text_encoder": _clip(tokenizer, 32, CLIPTextModel),
            "text_encoder_2": _t5(),
        }
    shift = {"use_dynamic_shifting": True, "shift": 3.0} if guided else {"shift": 1.0}
    FluxPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    ).save_pretrained(folder)
    return folder


def make_tiny_z_image(folder: Path, shift: float = 3.0) -> Path:
    """Z-Image with random weights, as a diffusers folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = ZImageTransformer2DModel(
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.data.normal_()
        text = Qwen3Config(
            vocab_size=280,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        ZImagePipeline(
            transformer=transformer,
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=Qwen3Model(text),
            tokenizer=_qwen_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        ).save_pretrained(folder)
    return folder


def z_image_to_native(transformer: ZImageTransformer2DModel) -> dict[str, torch.Tensor]:
    """The weights under the names of ComfyUI's layout, in which queries, keys and values are one matrix."""
    names = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        ".norm_q.": ".q_norm.",
        ".norm_k.": ".k_norm.",
        ".to_out.0.": ".out.",
    }
    native, state = {}, transformer.state_dict()
    for name, weight in state.items():
        if name.endswith(".to_q.weight"):
            block = name.removesuffix("to_q.weight")
            native[f"{block}qkv.weight"] = torch.cat([state[f"{block}to_{part}.weight"] for part in "qkv"])
        elif not name.endswith((".to_k.weight", ".to_v.weight")):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            native[name] = weight
    return native


def vae_to_ldm(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    return runpy.run_path(str(ROOT / "benchmarks" / "full_architecture.py"))["vae_to_ldm"](vae)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, and Qwen's marks of a chat."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    return tokenizer


def _vae(**config) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=16,
        **config,
    )


def _clip(tokenizer, width: int, cls=CLIPTextModelWithProjection):
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4))


def _t5_tokenizer() -> T5TokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581green", "\u2581circle", "\u2581rabbit"]
    tokens = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=2))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokens, extra_ids=0)
