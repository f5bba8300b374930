"""Stable Diffusion XL as MODEL, CLIP and VAE of ComfyUI, and as ours: the true classes, with small random weights."""

from types import SimpleNamespace

import comfy.model_detection
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from accelerate import init_empty_weights
from begin import CPU, PROMPTS, difference, drawn, patched_in
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from families import EightPixels, job, native_vae, with_and_without_lora
from small_models import small_xl
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfy_tdpo.models.conditioning import TensorConditioning
from comfy_tdpo.models.shipped import CONFIGS, clip_tokenizer, read_config
from comfy_tdpo.models.stable_diffusion import ClipPair, ClipText, StableDiffusion
from comfy_tdpo.nodes.comfy import models_in
from comfy_tdpo.nodes.comfy.encoded import EncodedPrompts

TEXTS = {"l": (CLIPTextModel, 32), "g": (CLIPTextModelWithProjection, 48)}


def sdxl() -> dict:
    model, clip, ours = small_xl(), *texts()
    encoded = EncodedPrompts(clip, {prompt: prompt for prompt in PROMPTS}, CPU, pooled=True)(PROMPTS)
    expected = ours(PROMPTS)
    found = {name: difference(encoded.parts[name], expected.parts[name]) for name in ("states", "pooled")}
    found["networks"] = {"XL": network(model, encoded)}
    return found | published() | {"job": job(model, clip, native_vae())}


def published() -> dict[str, list[str]]:
    """The weights of SDXL's published U-Net that ComfyUI knows by no name of diffusers, and what our conversion makes
    different in its configuration."""
    shipped = read_config(CONFIGS / "sdxl", "unet/config.json")
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(shipped)
    config = comfy.model_detection.unet_config_from_diffusers_unet(unet.state_dict())
    family = comfy.supported_models.SDXL(config)
    native = SimpleNamespace(model_config=family, diffusion_model=nn.GroupNorm(shipped["norm_num_groups"], 320))
    made = models_in.diffusers_config(SimpleNamespace(model=native))
    return {
        "unknown names": sorted(unet.state_dict().keys() - comfy.utils.unet_to_diffusers(family.unet_config).keys()),
        "other settings": [name for name, value in made.items() if shipped[name] != value],
    }


def texts() -> tuple[comfy.sd.CLIP, ClipPair]:
    """A CLIP of ComfyUI, whose two encoders are narrow, and the same for us."""
    made = {}
    for (name, (cls, width)), place in zip(TEXTS.items(), ("text_encoder", "text_encoder_2"), strict=True):
        sizes = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
        config = CLIPTextConfig.from_pretrained(CONFIGS / "sdxl" / place, **sizes, projection_dim=width)
        torch.manual_seed(0)
        made[name] = cls(config).eval()
        for weight in made[name].parameters():  # as large as after training, so that layers matter
            weight.data = weight.data * 3 if weight.ndim > 1 else weight.data

    class Pair(comfy.sdxl_clip.SDXLClipModel):
        """As SDXL's, but for its size."""

        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 - as ComfyUI's own
            nn.Module.__init__(self)
            self.clip_l, self.clip_g = (native_text(made[name], name, device, dtype) for name in TEXTS)
            self.dtypes = {dtype}

    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, Pair)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    tokenizers = [clip_tokenizer(CONFIGS / "sdxl", name) for name in ("tokenizer", "tokenizer_2")]
    return clip, ClipPair(*map(ClipText, tokenizers, made.values()))


def native_text(network, name: str, device, dtype) -> comfy.sd1_clip.SDClipModel:
    config = network.config
    part = comfy.sd1_clip.SDClipModel(
        textmodel_json_config=config.to_dict() | {"eos_token_id": 49407},
        layer="hidden",
        layer_idx=-2,
        layer_norm_hidden_state=False,
        return_projected_pooled=True,
        special_tokens={"start": 49406, "end": 49407, "pad": 49407 if name == "l" else 0},
        device=device,
        dtype=dtype,
    )
    state = {key.removeprefix("text_model."): weight for key, weight in network.state_dict().items()}
    projection = state.pop("text_projection.weight", torch.eye(config.hidden_size))
    named = {f"text_model.{key}": weight for key, weight in state.items()}
    part.transformer.load_state_dict(named | {"text_projection.weight": projection})
    return part


def network(model, conditioning: TensorConditioning) -> dict[str, float]:
    """For images of 128 x 96 pixels."""
    latents, times = drawn(2, 4, 12, 16), torch.tensor([10, 700])
    states, pooled = conditioning.parts["states"], conditioning.parts["pooled"]

    def native(inner, width: int = 128, height: int = 96) -> Tensor:
        y = inner.encode_adm(pooled_output=pooled, width=width, height=height)
        return inner.diffusion_model(latents, times, context=states, y=y)

    def made(unet) -> StableDiffusion:
        return StableDiffusion(unet, scheduler, lambda prompts: conditioning, EightPixels(), "small")

    scheduler = models_in.scheduler_of(model)
    with patched_in(model.clone()) as inner:
        turned = difference(native(inner, width=96, height=128), native(inner))
    return with_and_without_lora(
        model,
        native,
        models_in.diffusers_unet,
        made,
        (latents, times, conditioning),
        lambda unet: StableDiffusionXLPipeline(*(None,) * 5, unet, scheduler),
    ) | {"what the sizes change": turned}
