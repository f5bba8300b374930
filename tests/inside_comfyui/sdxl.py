"""Stable Diffusion XL as MODEL, CLIP and VAE of ComfyUI, and as ours: the true classes, with small random weights."""

from pathlib import Path
from tempfile import TemporaryDirectory
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
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from small_models import small_xl, trained
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfy_tdpo.models.conditioning import TensorConditioning
from comfy_tdpo.models.lora import UNetLora
from comfy_tdpo.models.shipped import CONFIGS, clip_tokenizer, read_config
from comfy_tdpo.models.stable_diffusion import ClipPair, ClipText, StableDiffusion
from comfy_tdpo.nodes.comfy import models_in, shapes_out
from comfy_tdpo.nodes.comfy.encoded import EncodedPrompts

TEXTS = {"l": (CLIPTextModel, 32), "g": (CLIPTextModelWithProjection, 48)}
RANK, ALPHA = 4, 2.0


def sdxl() -> dict:
    model, clip, ours = small_xl(), *texts()
    encoded = EncodedPrompts(clip, {prompt: prompt for prompt in PROMPTS}, CPU, pooled=True)(PROMPTS)
    expected = ours(PROMPTS)
    found = {name: difference(encoded.parts[name], expected.parts[name]) for name in ("states", "pooled")}
    found |= unets(model, encoded)
    vae = shapes_out._native_vae(small_vae())
    return found | published() | {"job": job(model, clip, vae)}


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


def unets(model, conditioning: TensorConditioning) -> dict[str, float]:
    """The network with and without a LoRA, by ComfyUI, by us and by diffusers, for images of 128 x 96 pixels."""
    latents, times = drawn(2, 4, 12, 16), torch.tensor([10, 700])
    states, pooled = conditioning.parts["states"], conditioning.parts["pooled"]
    sizes = {"width": 128, "height": 96}

    def native(patched, **sizes: int) -> Tensor:
        with patched_in(patched) as inner:
            y = inner.encode_adm(pooled_output=pooled, **sizes)
            return inner.diffusion_model(latents, times, context=states, y=y)

    unet = models_in.diffusers_unet(model)
    ours = StableDiffusion(unet, models_in.scheduler_of(model), lambda prompts: conditioning, EightPixels(), "small")
    plain = native(model.clone(), **sizes)
    found = {
        "unet from native": difference(ours.denoise(latents, times, conditioning), plain),
        "scale of the output": plain.abs().max().item(),
        "what the sizes change": difference(native(model.clone(), width=96, height=128), plain),
    }
    lora = UNetLora(unet, RANK, ALPHA, "attention+feed-forward", seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    expected, state = ours.denoise(latents, times, conditioning), lora.file_state()
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0)
    found["modules of the LoRA that ComfyUI leaves out"] = len(state) / 3 - len(patched.patches)
    found["LoRA in ComfyUI"] = difference(native(patched, **sizes), expected)
    found["what the LoRA changes"] = difference(expected, plain)
    again = models_in.diffusers_unet(model)
    pipeline = StableDiffusionXLPipeline(*(None,) * 5, again, ours.scheduler)
    with TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "lora.safetensors")
        pipeline.load_lora_weights(folder, weight_name="lora.safetensors")
    ours.network = again
    found["LoRA in diffusers"] = difference(ours.denoise(latents, times, conditioning), expected)
    return found


class EightPixels:
    factor = 8


def small_vae(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=64,
    ).eval()


def job(model, clip, vae, steps: int = 2, resolution: str = "64x96") -> dict:
    """How a run of the preset that a node takes for this MODEL ends, but for its size."""
    from comfy_tdpo.nodes.runs.reward_choice import RewardChoice

    wires = models_in.Wires(model, clip, vae)
    small = f'precision = "fp32"\nguards = []\nresolution = "{resolution}"\noutput.grid_images = 2'
    numbers = {"epochs": 1, "samples_per_epoch": 4}
    wanted = wires.wanted(
        reward=RewardChoice({"shapes-aesthetic": 1.0}), numbers=numbers, settings=small, prompt_set="shapes"
    )
    preset = wanted.config()
    config = preset.model_copy(update={"steps": steps})
    with TemporaryDirectory() as folder:
        return trained(wires, config, Path(folder) / "run") | {"preset's steps": preset.steps}
