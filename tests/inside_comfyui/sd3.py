"""Stable Diffusion 3 as MODEL, CLIP and VAE of ComfyUI, and as ours: the true classes, with small random weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.t5
import comfy.utils
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from begin import CPU, PROMPTS, difference, drawn, refusal
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from families import EightPixels, job, native_vae, node, off_levels, with_and_without_lora
from sdxl import native_text
from small_models import draw_weights, small
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from comfy_tdpo.models import sd3_file
from comfy_tdpo.models.conditioning import TensorConditioning
from comfy_tdpo.models.shipped import CONFIGS
from comfy_tdpo.models.stable_diffusion_3 import StableDiffusion3
from comfy_tdpo.nodes.comfy import sd3_in
from comfy_tdpo.nodes.comfy.encoded import EncodedPrompts
from comfy_tdpo.nodes.comfy.whole import apply_model
from comfy_tdpo.process.flow_schedule import FlowSchedule

WIDTHS = {"l": 32, "g": 48}  # of the CLIPs
TEXT = 4096  # the width that ComfyUI fills the states to
LAYERS = 2


def sd3() -> dict:
    model, clip = small_sd3(), small_clip()
    encode = EncodedPrompts(clip, {prompt: prompt for prompt in PROMPTS}, CPU, pooled=True, joint=True, t5=True)
    long = " ".join(["red circle"] * 60)
    wide = drawn(2, 16, 12, 16)  # images of 128 x 96 pixels
    found = texts(clip, encode) | schedules(model) | published()
    found["networks"] = {"3.5 medium": network(model, encode(PROMPTS), wide)}
    found["a prompt too long"] = refusal(
        lambda: EncodedPrompts(clip, {long: long}, CPU, pooled=True, joint=True, t5=True)
    )
    found["a whole model"] = refusal(lambda: apply_model(model, {}, 1.0, "run 'mine'"))
    return found | {"job": job(model, clip, native_vae(channels=16), steps=3)}


def small_sd3() -> comfy.model_patcher.ModelPatcher:
    """In the layout of Stable Diffusion 3.5 medium."""
    config = {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": LAYERS,
        "input_size": None,
        "adm_in_channels": sum(WIDTHS.values()),
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": TEXT, "out_features": 64 * LAYERS},
        },
        "num_patches": 16**2,
        "pos_embed_max_size": 16,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0],
    }
    made = small(comfy.supported_models.SD3, config)
    made.model.diffusion_model.pos_embed = drawn(1, 16**2, 64 * LAYERS)  # a buffer, which comes from the file
    return made


def small_clip() -> comfy.sd.CLIP:
    """The three encoders: two narrow CLIPs, and T5 with one narrow layer, whose states are filled up."""
    made = {}
    for name, width in WIDTHS.items():
        sizes = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
        config = CLIPTextConfig.from_pretrained(CONFIGS / "sdxl" / "text_encoder_2", **sizes, projection_dim=width)
        torch.manual_seed(0)
        made[name] = CLIPTextModelWithProjection(config).eval()

    class Three(comfy.text_encoders.sd3_clip.SD3ClipModel):
        """As SD 3's, but for its size."""

        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 - as ComfyUI's own
            nn.Module.__init__(self)
            self.clip_l, self.clip_g = (native_text(made[name], name, device, dtype) for name in WIDTHS)
            self.t5xxl = narrow_t5(device, dtype)
            self.t5_attention_mask, self.dtypes = False, {dtype}

    target = comfy.supported_models_base.ClipTarget(comfy.text_encoders.sd3_clip.SD3Tokenizer, Three)
    return comfy.sd.CLIP(target, model_options={"dtype": torch.float32})


class NarrowT5(comfy.sd1_clip.SDClipModel):
    """T5 whose states are filled up to the width of T5-XXL."""

    def encode_token_weights(self, pairs):
        states, *more = super().encode_token_weights(pairs)
        return F.pad(states, (0, TEXT - states.shape[-1])), *more


def narrow_t5(device, dtype) -> NarrowT5:
    """With one layer."""
    config = json.loads((Path(comfy.text_encoders.sd3_clip.__file__).parent / "t5_config_xxl.json").read_text())
    made = NarrowT5(
        device=device,
        layer="last",
        textmodel_json_config=config | {"d_model": 64, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_layers": 1},
        dtype=dtype,
        special_tokens={"end": 1, "pad": 0},
        model_class=comfy.text_encoders.t5.T5,
    )
    draw_weights(made)
    return made


def texts(clip, encode) -> dict:
    """A prompt encoded by itself, as ComfyUI does, and beside one whose words CLIP knows and T5 has to spell."""
    prompt, longer = PROMPTS[0], "cosplay " * 60

    def encoded(*prompts: str) -> dict[str, Tensor]:
        texts = {one: one for one in prompts}
        return EncodedPrompts(clip, texts, CPU, pooled=True, joint=True, t5=True)([prompt]).parts

    states, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    alone, beside = encoded(prompt), encoded(prompt, longer)
    return {
        "states": difference(alone["states"], states),
        "pooled": difference(alone["pooled"], pooled),
        "tokens": [parts["states"].shape[1] for parts in (encode(PROMPTS).parts, alone, beside)],
        "states of CLIP beside a longer prompt": difference(beside["states"][:, :77], states[:, :77]),
    }


def network(model, conditioning: TensorConditioning, latents: Tensor) -> dict[str, float]:
    """For two latents."""
    times, parts = torch.tensor([10.0, 700.0]), conditioning.parts

    def made(network) -> StableDiffusion3:
        return StableDiffusion3(network, FlowSchedule(3.0), lambda prompts: conditioning, EightPixels(), "small")

    return with_and_without_lora(
        model,
        lambda inner: inner.diffusion_model(latents, times, context=parts["states"], y=parts["pooled"]),
        sd3_in.diffusers_transformer,
        made,
        (latents, times, conditioning),
        lambda network: StableDiffusion3Pipeline(network, None, *(None,) * 7),
    )


def schedules(model) -> dict:
    """What the noise levels are read as, with ComfyUI's own nodes, and how far ComfyUI's simple scheduler is."""
    (shifted,) = node("ModelSamplingSD3").patch(model, 5.0)
    (flux,) = node("ModelSamplingFlux").patch(model, 1.15, 0.5, 512, 512)
    return {
        "shifts": [sd3_in.flow_schedule(one).shift for one in (model, shifted)],
        "levels": off_levels(shifted, sd3_in.flow_schedule(shifted)),
        "other levels": refusal(lambda: sd3_in.flow_schedule(flux)),
    }


def published() -> dict:
    """Of 3 medium and 3.5 medium at true size, without memory: the weights that ComfyUI knows by no name of diffusers,
    and what our conversions make different in their configuration, of a MODEL and of a file."""
    found = {}
    for name, layers, dual, norm, places in (
        ("3 medium", 24, (), None, 192),
        ("3.5 medium", 24, tuple(range(13)), "rms_norm", 384),
    ):
        sizes = {
            "num_layers": layers,
            "num_attention_heads": layers,
            "caption_projection_dim": 64 * layers,
            "pos_embed_max_size": places,
            "dual_attention_layers": dual,
            "qk_norm": norm,
        }
        with init_empty_weights(include_buffers=True):
            network = SD3Transformer2DModel(**sizes)
        state = network.state_dict()
        native = dict.fromkeys(_native_names(state, layers))
        config = comfy.model_detection.detect_unet_config(
            {key: _shaped(key, state, layers, places) for key in native}, ""
        )
        made = sd3_in.transformer_config(
            SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(unet_config=config)))
        )
        known = comfy.utils.mmdit_to_diffusers(config)
        found[name] = {
            "unknown names": sorted(state.keys() - known.keys()),
            "other settings": [key for key, value in made.items() if network.config[key] != value],
            "other weights of a file": _from_file(config, state),
        }
    return {"published": found}


def _from_file(config: dict, expected: dict[str, Tensor]) -> list[str]:
    """The weights that a file with ComfyUI's own names does not give the transformer, or in another shape."""
    with torch.device("meta"):
        native = OpenAISignatureMMDITWrapper(**config, operations=torch.nn).state_dict()
    weights = SimpleNamespace(names=native.keys(), source="file", shape=lambda name: tuple(native[name].shape))
    empty, found = sd3_file.empty_transformer(weights), convert_sd3_transformer_checkpoint_to_diffusers(dict(native))
    shapes = [{key: tuple(weight.shape) for key, weight in part.items()} for part in (empty.state_dict(), found)]
    wanted = {key: tuple(weight.shape) for key, weight in expected.items()}
    return [key for key in wanted | shapes[0] | shapes[1] if {wanted.get(key)} != {part.get(key) for part in shapes}]


def _native_names(state: dict[str, Tensor], layers: int) -> list[str]:
    places = comfy.utils.mmdit_to_diffusers({"depth": layers})
    return [place if isinstance(place, str) else place[0] for name, place in places.items() if name in state]


def _shaped(key: str, state: dict[str, Tensor], layers: int, places: int) -> Tensor:
    """A weight of ComfyUI's name, of which only the shapes that tell the configuration are right."""
    shapes = {
        "x_embedder.proj.weight": (64 * layers, 16, 2, 2),
        "final_layer.linear.weight": (64, 64 * layers),
        "y_embedder.mlp.0.weight": (64 * layers, 2048),
        "context_embedder.weight": (64 * layers, 4096),
        "pos_embed": (1, places**2, 64 * layers),
    }
    return torch.empty(shapes.get(key, (1,)), device="meta")
