"""Z-Image as MODEL, CLIP and VAE of ComfyUI, and as ours: the true classes, with small random weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.llama
import comfy.utils
import torch
from accelerate import init_empty_weights
from begin import CPU, PROMPTS, difference, drawn, refusal
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from families import EightPixels, job, native_vae, node, off_levels, with_and_without_lora
from small_models import draw_weights, small
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from comfy_tdpo.models.conditioning import ListConditioning
from comfy_tdpo.models.lora import TransformerLora
from comfy_tdpo.models.shipped import CONFIGS, read_config
from comfy_tdpo.models.z_image import LORA_MODULES, QwenText, ZImage
from comfy_tdpo.nodes.comfy import models_in, z_image_in
from comfy_tdpo.nodes.comfy.whole import apply_model

RANK, ALPHA = 4, 2.0
TEXT = 64  # width of the language model
DIM = 1024  # the least that ComfyUI's embedding of time takes
HEAD = 128
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def z_image() -> dict:
    found = {"as Lumina 2": refusal(lambda: models_in.Wires(as_lumina_2(), object(), object()).check())}
    if not hasattr(comfy.supported_models, "ZImage"):
        return found
    model, clip, ours = small_z_image(), *texts()
    encode = z_image_in.EncodedStates(clip, {prompt: prompt for prompt in PROMPTS}, CPU)
    got, expected = encode(PROMPTS).states, ours(PROMPTS).states
    found |= {
        "states": max(map(difference, got, expected)),
        "scale of the states": expected[0].abs().max().item(),
        "tokens": [len(states) for states in got],
        "tokens of ours": [len(states) for states in expected],
        "a whole model": refusal(lambda: apply_model(model, {}, 1.0, "run 'mine'")),
    }
    found |= {"networks": {"Z-Image": network(model, encode(PROMPTS))}} | schedules(model) | published()
    return found | {"job": job(model, clip, native_vae(channels=16), steps=3)}


def as_lumina_2() -> SimpleNamespace:
    """A MODEL of Z-Image as versions before it take it: Lumina 2 of another width."""
    config = {"image_model": "lumina2", "dim": 3840, "n_heads": 24, "n_kv_heads": 8}
    return SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(unet_config=config)))


def small_z_image() -> comfy.model_patcher.ModelPatcher:
    config = {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": DIM,
        "cap_feat_dim": TEXT,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "qk_norm": True,
        "n_heads": DIM // HEAD,
        "n_kv_heads": DIM // HEAD,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8 / 3,
        "multiple_of": 2,  # of 256 otherwise, which only the true width fits
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }

    return small(comfy.supported_models.ZImage, config)


def texts() -> tuple[comfy.sd.CLIP, QwenText]:
    """A CLIP of ComfyUI whose language model is narrow and has three layers, and the same for us."""
    import comfy.text_encoders.z_image as native

    sizes = {
        "hidden_size": TEXT,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }

    class Narrow(comfy.text_encoders.llama.Qwen3_4B):
        def __init__(self, config_dict, *args, **kwargs):
            super().__init__(config_dict | sizes, *args, **kwargs)

    class Text(comfy.sd1_clip.SDClipModel):
        """As Z-Image's, but for its size."""

        def __init__(self, device, dtype, model_options, textmodel_json_config):
            super().__init__(
                device=device,
                layer="hidden",
                layer_idx=-2,
                textmodel_json_config={},
                dtype=dtype,
                special_tokens={"pad": 151643},
                layer_norm_hidden_state=False,
                model_class=Narrow,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options,
            )
            draw_weights(self)

    class Wrapped(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 - as ComfyUI's own
            super().__init__(device=device, dtype=dtype, name="qwen3_4b", clip_model=Text, model_options=model_options)

    target = comfy.supported_models_base.ClipTarget(native.ZImageTokenizer, Wrapped)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    config = read_config(CONFIGS / "z-image", "text_encoder/config.json") | sizes
    network = Qwen3Model(Qwen3Config.from_dict(config)).eval()
    state = clip.cond_stage_model.qwen3_4b.transformer.model.state_dict()
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    folder = Path(comfy.text_encoders.llama.__file__).parent / "qwen25_tokenizer"
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return clip, QwenText(tokenizer, network)


def network(model, conditioning: ListConditioning) -> dict[str, float]:
    """For images of 128 x 96 pixels."""
    latents, times = drawn(2, 16, 12, 16), torch.tensor([0.01, 0.7])

    def native(inner) -> Tensor:
        rows = [
            inner.diffusion_model(latents[[k]], times[[k]], context=states[None], num_tokens=len(states))
            for k, states in enumerate(conditioning.states)
        ]
        return torch.cat(rows)

    def made(network) -> ZImage:
        return ZImage(network, z_image_in.flow_schedule(model), lambda prompts: conditioning, EightPixels(), "small")

    return with_and_without_lora(
        model,
        native,
        z_image_in.diffusers_transformer,
        made,
        (latents, times, conditioning),
        lambda network: ZImagePipeline(None, None, None, None, network),
        change=0.02,
    )


def schedules(model) -> dict:
    """What the noise levels are read as, with ComfyUI's own nodes, which preset they stand for, and how far ComfyUI's
    simple scheduler is."""
    (base,) = node("ModelSamplingAuraFlow").patch_aura(model, 6.0)
    (flux,) = node("ModelSamplingFlux").patch(model, 1.15, 0.5, 512, 512)
    return {
        "shifts": [z_image_in.flow_schedule(one).shift for one in (model, base)],
        "presets": [z_image_in.preset_of(one) for one in (model, base)],
        "levels": off_levels(base, z_image_in.flow_schedule(base)),
        "other levels": refusal(lambda: z_image_in.flow_schedule(flux)),
    }


def published() -> dict[str, list[str]]:
    """At true size, without memory: the weights and the modules of a LoRA that ComfyUI knows by no name of diffusers,
    and what our conversion makes different in the configuration."""
    shipped = read_config(CONFIGS / "z-image", "transformer/config.json")
    with init_empty_weights():
        network = ZImageTransformer2DModel.from_config(shipped)
    state = network.state_dict()
    places = comfy.utils.z_image_to_diffusers({"n_layers": shipped["n_layers"], "dim": shipped["dim"]})
    native = {}
    for name, weight in state.items():
        place = places[name]
        native[place if isinstance(place, str) else place[0]] = weight
    config = comfy.model_detection.detect_unet_config(native, "")
    made = z_image_in.transformer_config(
        SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(unet_config=config)))
    )
    known = comfy.utils.z_image_to_diffusers(config)
    TransformerLora(network, RANK, ALPHA, LORA_MODULES["attention+feed-forward"], seed=0)
    modules = {name.partition(".lora_A")[0] for name, _ in network.named_parameters() if ".lora_A" in name}
    return {
        "unknown names": sorted(state.keys() - known.keys()),
        "other settings": [key for key, value in made.items() if json.dumps(shipped[key]) != json.dumps(value)],
        "unknown modules": sorted(module for module in modules if f"{module}.weight" not in known),
        "modules": len(modules),
    }
