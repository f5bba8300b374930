"""FLUX.1 as MODEL, CLIP and VAE of ComfyUI, and as ours: the true classes, with small random weights."""

import math
from types import SimpleNamespace

import comfy.lora
import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.utils
import torch
from accelerate import init_empty_weights
from begin import CPU, PROMPTS, difference, drawn, patched_in, refusal
from comfy.ldm.flux.model import FluxParams
from diffusers import FluxPipeline, FluxTransformer2DModel
from families import EightPixels, job, native_vae, node, off_levels, with_and_without_lora
from sd3 import TEXT, narrow_t5
from sdxl import native_text
from small_models import small
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from comfy_tdpo.models.conditioning import TensorConditioning
from comfy_tdpo.models.flux import Flux
from comfy_tdpo.models.lora import TransformerLora
from comfy_tdpo.models.shipped import CONFIGS, clip_tokenizer
from comfy_tdpo.models.stable_diffusion import ClipText
from comfy_tdpo.nodes.comfy import flux_in, models_in, shapes_out
from comfy_tdpo.nodes.comfy.encoded import EncodedPrompts
from comfy_tdpo.nodes.comfy.whole import apply_model
from comfy_tdpo.process.flow_schedule import FlowSchedule

RANK, ALPHA = 4, 2.0
POOLED = 32  # the width of CLIP


def flux() -> dict:
    model, (clip, ours) = small_flux(), small_clip()
    encode = EncodedPrompts(clip, {prompt: prompt for prompt in PROMPTS}, CPU, pooled=True, joint=True, t5=True)
    found = texts(clip, encode, ours) | schedules(model) | published() | refused(model)
    kinds = {"dev": model, "schnell": small_flux(guided=False)}
    found["networks"] = {name: network(one, encode(PROMPTS)) for name, one in kinds.items()}
    vae = native_vae(channels=16)
    found["job"] = job(model, clip, vae, steps=3)
    wires = models_in.Wires(small_flux(guided=False), clip, vae)
    return found | {"preset of schnell": wires.wanted(reward=None).preset}


SMALL = {"vec_in_dim": POOLED, "hidden_size": 64, "num_heads": 2, "axes_dim": [8, 12, 12]}
TRUE = {"vec_in_dim": 768, "hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56]}


def config_of(guided: bool, blocks: tuple[int, int], sizes: dict) -> dict:
    """A configuration as ComfyUI detects it in a file."""
    config = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "context_in_dim": TEXT,
        "mlp_ratio": 4.0,
        "depth": blocks[0],
        "depth_single_blocks": blocks[1],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": guided,
    }
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:  # of FLUX.2's age
        config["txt_ids_dims"] = []
    return config | sizes


def small_flux(guided: bool = True) -> comfy.model_patcher.ModelPatcher:
    kind = comfy.supported_models.Flux if guided else comfy.supported_models.FluxSchnell
    return small(kind, config_of(guided, (2, 2), SMALL))


def small_clip() -> tuple[comfy.sd.CLIP, ClipText]:
    """A narrow CLIP and a narrow T5, and CLIP for us."""
    sizes = {"hidden_size": POOLED, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    torch.manual_seed(0)
    network = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "flux-dev" / "text_encoder", **sizes)).eval()

    class Two(comfy.text_encoders.flux.FluxClipModel):
        """As FLUX.1's, but for its size."""

        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 - as ComfyUI's own
            nn.Module.__init__(self)
            self.clip_l, self.t5xxl = native_text(network, "l", device, dtype), narrow_t5(device, dtype)
            self.dtypes = {dtype}

    target = comfy.supported_models_base.ClipTarget(comfy.text_encoders.flux.FluxTokenizer, Two)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    return clip, ClipText(clip_tokenizer(CONFIGS / "flux-dev"), network)


def texts(clip, encode, ours: ClipText) -> dict:
    """A prompt encoded by itself, as ComfyUI does, and beside one that is longer than T5's least number of tokens."""
    prompt, longer = PROMPTS[0], "cosplay " * 150
    states, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    alone = encode([prompt]).parts
    beside = EncodedPrompts(clip, {prompt: prompt, longer: longer}, CPU, pooled=True, joint=True, t5=True)
    both = beside([prompt, longer]).parts
    return {
        "states": difference(alone["states"], states),
        "pooled": difference(alone["pooled"], pooled),
        "pooled by transformers": difference(encode(PROMPTS).parts["pooled"], ours.outputs(PROMPTS).pooler_output),
        "tokens": [parts["states"].shape[1] for parts in (alone, both)],
    }


def network(model, conditioning: TensorConditioning) -> dict[str, float]:
    """For images of 128 x 96 pixels."""
    latents, times = drawn(2, 16, 12, 16), torch.tensor([10.0, 700.0])
    states, pooled = conditioning.parts["states"], conditioning.parts["pooled"]

    def native(inner, guidance: float = 2.0) -> Tensor:
        scale = torch.full((2,), guidance)
        return inner.diffusion_model(latents, times / 1000, context=states, y=pooled, guidance=scale)

    def made(network) -> Flux:
        flux = Flux(network, FlowSchedule(), lambda prompts: conditioning, EightPixels(), "small")
        flux.embedded_guidance = 2.0 if network.config.guidance_embeds else None
        return flux

    with patched_in(model.clone()) as inner:
        guided = difference(native(inner, guidance=5.0), native(inner))
    return with_and_without_lora(
        model,
        native,
        flux_in.diffusers_transformer,
        made,
        (latents, times, conditioning),
        lambda network: FluxPipeline(None, None, None, None, None, None, network),
    ) | {"what guidance changes": guided}


def schedules(model) -> dict:
    """What the noise levels are read as, with ComfyUI's own nodes, and how far ComfyUI's simple scheduler is."""
    (half,) = node("ModelSamplingFlux").patch(model, 1.15, 0.5, 512, 512)
    (edm,) = node("ModelSamplingContinuousEDM").patch(model, "v_prediction", 120.0, 0.002)
    found = {}
    for name, one in (("dev", model), ("dev at 512 px", half), ("schnell", small_flux(guided=False))):
        schedule = flux_in.flow_schedule(one)
        found[name] = {"mu": math.log(schedule.shift), "levels": off_levels(one, schedule)}
    return {"schedules": found, "other levels": refusal(lambda: flux_in.flow_schedule(edm))}


def refused(model) -> dict[str, str]:
    """What a user reads who wires in a relative of FLUX.1, or something of another model."""

    def kin(kind: str, **changes) -> str:
        family = getattr(comfy.supported_models, kind)(model.model.model_config.unet_config | changes)
        return refusal(lambda: flux_in.transformer_config(SimpleNamespace(model=SimpleNamespace(model_config=family))))

    _, clip, _ = shapes_out.shapes_native()
    encode = EncodedPrompts
    return {
        "Fill": kin("FluxInpaint", in_channels=96),
        "Canny": kin("Flux", in_channels=32),
        "FLUX.2": kin("Flux", image_model="flux2", in_channels=128),
        "no pooled": kin("Flux", vec_in_dim=None),
        "another MLP": kin("Flux", yak_mlp=True),
        "as it is": kin("Flux"),
        "a whole model": refusal(lambda: apply_model(model, {}, 1.0, "run 'mine'")),
        "another CLIP": refusal(lambda: encode(clip, {"": ""}, CPU, pooled=True, joint=True, t5=True)),
    }


def published() -> dict:
    """Of dev and schnell at true size, without memory: the weights that ComfyUI knows by no name of diffusers, what our
    conversion makes different in their configuration, and the layers of a LoRA that ComfyUI has no name for."""
    found = {}
    for name, kind in (("dev", comfy.supported_models.Flux), ("schnell", comfy.supported_models.FluxSchnell)):
        with init_empty_weights(include_buffers=True):
            network = FluxTransformer2DModel(guidance_embeds=name == "dev")
        names = set(network.state_dict())
        native = kind(config_of(name == "dev", (19, 38), TRUE)).get_model({}, device=torch.device("meta"))
        config = comfy.model_detection.detect_unet_config(native.diffusion_model.state_dict(), "")
        native.model_config.unet_config = config
        made = flux_in.transformer_config(SimpleNamespace(model=native))
        ours = Flux(network, FlowSchedule(), lambda prompts: None, EightPixels(), "published")
        with init_empty_weights():
            lora = TransformerLora(network, RANK, ALPHA, ours.lora_modules("attention+feed-forward"), seed=0)
        layers = {key.rsplit(".lora_", 1)[0] for key in lora.file_state()}
        found[name] = {
            "layers of a LoRA": len(layers),
            "unknown layers": sorted(layers - comfy.lora.model_lora_keys_unet(native, {}).keys()),
            "unknown names": sorted(names - comfy.utils.flux_to_diffusers(config).keys()),
            "other settings": [key for key, value in made.items() if network.config[key] != value],
        }
    return {"published": found}
