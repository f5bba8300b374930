"""Between ComfyUI's own MODEL, CLIP and VAE and what the trainer works on.

Nothing that comes in is shared with the training: weights are copied, with the LoRAs that are applied to a MODEL baked
in, and the copies belong to the caller. They are made outside of inference mode, in which ComfyUI runs its nodes and
whose tensors can never be trained. Imports ComfyUI, so it is itself imported by the nodes only.
"""

import copy
import hashlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import comfy.latent_formats
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from comfy_tdpo.loading import Components, load_components
from comfy_tdpo.shapes import WORLD

SUPPORTED = "expected Stable Diffusion 1.x or 2.x for text to image"


# --- out of ComfyUI: what is trained


def diffusers_unet(model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The U-Net of a MODEL as diffusers', in `dtype` on the CPU, with the LoRAs that are applied to it baked in.

    Raises:
        ValueError: the MODEL is not Stable Diffusion 1.x or 2.x.
    """
    config = diffusers_config(model)
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    with torch.inference_mode(False), torch.no_grad():
        weights = baked_weights(model, dtype)
        with torch.device("meta"):  # its own weights are not drawn, as none of them stays
            unet = UNet2DConditionModel(**config)
        unet.load_state_dict({name: weights[names[name]] for name in unet.state_dict()}, assign=True)
    return unet.eval()


def diffusers_config(model: comfy.model_patcher.ModelPatcher) -> dict:
    """The configuration of diffusers' U-Net for the one in a MODEL."""
    config = model.model.model_config.unet_config
    width, context = config.get("model_channels"), config.get("context_dim")
    if not (width and isinstance(context, int)) or config.get("adm_in_channels"):
        kind = type(model.model.model_config).__name__
        raise ValueError(f"got a MODEL of the family {kind}; {SUPPORTED}: load such a checkpoint")
    if config["in_channels"] != 4:
        raise ValueError(f"got a MODEL that takes {config['in_channels']} channels (inpainting); {SUPPORTED}")
    channels = [int(multiple * width) for multiple in config["channel_mult"]]
    layers, depths = config["num_res_blocks"], list(config["transformer_depth"])
    crossing = [depths[sum(layers[:i])] > 0 for i in range(len(layers))]
    heads, head_width = config["num_heads"], config["num_head_channels"]
    (groups,) = {m.num_groups for m in model.model.diffusion_model.modules() if isinstance(m, nn.GroupNorm)}
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": layers[0],
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossing],
        "up_block_types": ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossing)],
        # the number of heads, under diffusers' name for it
        "attention_head_dim": heads if heads > 0 else [channel // head_width for channel in channels],
        "cross_attention_dim": context,
        "use_linear_projection": config.get("use_linear_in_transformer", False),
        "norm_num_groups": groups,
    }


def baked_weights(model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the U-Net's weights, patched in float32 as ComfyUI would patch them, in `dtype` on the CPU."""
    prefix, weights = "diffusion_model.", {}
    for key, ((weight, convert), *patches) in model.get_key_patches(prefix).items():
        weight = weight.to("cpu", torch.float32, copy=True)
        if convert is not None:
            weight = convert(weight, inplace=True)
        weight = comfy.lora.calculate_weight(patches, weight, key) if patches else weight
        weights[key.removeprefix(prefix)] = weight.to(dtype)
    return weights


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """What a MODEL is called in a run's configuration: its family and a digest of its weights and the LoRAs on them.

    It tells two of them apart, and is nothing that could be loaded again.
    """
    digest = hashlib.sha256()
    for key, ((weight, _), *patches) in model.get_key_patches("diffusion_model.").items():
        for value in _values((key, weight, patches)):
            digest.update(value)
    return f"comfyui:{type(model.model.model_config).__name__}:{digest.hexdigest()[:12]}"


def _values(part: Any) -> Iterator[bytes]:
    """What tells a weight or a patch of one from others: the first values of each tensor, and every number."""
    if isinstance(part, Tensor):
        yield part.flatten()[:256].float().cpu().numpy().tobytes()
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _values(item)
    elif hasattr(part, "weights"):  # of a LoRA
        yield from _values(part.weights)
    elif isinstance(part, int | float | str):
        yield repr(part).encode()


def scheduler_of(model: comfy.model_patcher.ModelPatcher) -> DDIMScheduler:
    """The noise schedule of a MODEL, with the steps' offset that leaves noise in the last one."""
    sampling = model.get_model_object("model_sampling")  # a node may have put another one in the place of the model's
    bases = {base.__name__ for base in type(sampling).__mro__}
    if bases & {"EDM", "X0", "CONST"} or not bases & {"EPS", "V_PREDICTION"}:
        raise ValueError(f"got a MODEL that predicts neither noise nor v ({', '.join(sorted(bases))}); {SUPPORTED}")
    alpha_bar = 1 / (1 + sampling.sigmas.double().cpu() ** 2)
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.float().numpy(),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if "V_PREDICTION" in bases else "epsilon",
    )


class EncodedPrompts:
    """A PromptEncoder of prompts that a CLIP encoded beforehand, as a training may not load models by itself.

    Args:
        clip: the CLIP; prompts: all that will ever be asked for, the empty one among them.
    """

    def __init__(self, clip: comfy.sd.CLIP, prompts: list[str], device: torch.device):
        embeds = {prompt: clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in dict.fromkeys([*prompts, ""])}
        # long prompts come out longer; tokens that are repeated as a whole leave cross-attention as it is
        length = math.lcm(*(embed.shape[1] for embed in embeds.values()))
        with torch.inference_mode(False), torch.no_grad():
            self._embeds = {
                prompt: embed[0].to(device, torch.float32, copy=True).repeat(length // embed.shape[1], 1)
                for prompt, embed in embeds.items()
            }

    def __call__(self, prompts: list[str]) -> Tensor:
        return torch.stack([self._embeds[prompt] for prompt in prompts])


class ComfyDecoder:
    """A LatentDecoder: a copy of the network in a VAE, on `device`.

    Args:
        vae: the VAE; model: the MODEL that says how its latents are scaled.
    """

    def __init__(self, vae: comfy.sd.VAE, model: comfy.model_patcher.ModelPatcher, device: torch.device):
        vae.throw_exception_if_invalid()
        self.factor, self._dtype = vae.downscale_ratio, vae.vae_dtype
        self._process_output, self._process_latents = vae.process_output, model.model.latent_format.process_out
        with torch.inference_mode(False):
            self._network = copy.deepcopy(vae.first_stage_model).requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        pixels = self._network.decode(self._process_latents(latents).to(self._dtype))
        return self._process_output(pixels.float())


# --- into ComfyUI: the world of Shapes as native MODEL, CLIP and VAE


class Multiple(float):
    """A channel multiple that need not be whole, though the number of channels is: 1.5 times 64 is 96."""

    def __mul__(self, channels: int) -> int:  # type: ignore[override]
        return int(float(self) * channels)

    __rmul__ = __mul__  # type: ignore[assignment]


class ShapesConfig(comfy.supported_models.SD15):
    """The family of the U-Net of Shapes: Stable Diffusion 1.x's, narrower."""

    unet_config: dict = {}
    unet_extra_config: dict = {}


def is_shapes(model: comfy.model_patcher.ModelPatcher) -> bool:
    return isinstance(model.model.model_config, ShapesConfig)


def shapes_native() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of Shapes, float32, as ComfyUI's own sampler, encoder and decoder take them."""
    parts = load_components(str(WORLD / "pipeline"))
    return _native_model(parts), _native_clip(parts.text_encoder), _native_vae(parts.vae)


def _native_model(parts: Components) -> comfy.model_patcher.ModelPatcher:
    unet = parts.unet
    family = ShapesConfig(comfy_config(unet))
    family.set_inference_dtype(torch.float32, None)
    family.latent_format = comfy.latent_formats.SD15(scale_factor=parts.vae.config.scaling_factor)
    model = family.get_model({}, device=comfy.model_management.unet_offload_device())
    names = comfy.utils.unet_to_diffusers(family.unet_config)
    state = unet.state_dict()
    model.diffusion_model.load_state_dict({names[name]: weight for name, weight in state.items()})
    _set_groups(model.diffusion_model, unet.config.norm_num_groups)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def comfy_config(unet: UNet2DConditionModel) -> dict:
    """The inverse of `diffusers_config`: ComfyUI's configuration for a U-Net of diffusers."""
    config = unet.config
    width, layers = config.block_out_channels[0], config.layers_per_block
    depths = [int("CrossAttn" in block) for block in config.down_block_types]
    return {
        "image_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": width,
        "num_res_blocks": [layers] * len(depths),
        "channel_mult": [Multiple(channel / width) for channel in config.block_out_channels],
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "context_dim": config.cross_attention_dim,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config.use_linear_projection,
        "num_heads": config.attention_head_dim,
        "num_head_channels": -1,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def _native_vae(vae: AutoencoderKL) -> comfy.sd.VAE:
    config = vae.config
    channels = config.block_out_channels
    layout = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": config.sample_size,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": channels[0],
        "ch_mult": [channel // channels[0] for channel in channels],
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    network = {"params": {"ddconfig": layout, "embed_dim": config.latent_channels}}
    native = comfy.sd.VAE(sd=dict(vae.state_dict()), config=network, dtype=torch.float32)
    _set_groups(native.first_stage_model, config.norm_num_groups)
    return native


def _native_clip(text_encoder: CLIPTextModel) -> comfy.sd.CLIP:
    config, length = text_encoder.config, text_encoder.config.max_position_embeddings
    special = {"start": config.bos_token_id, "end": config.eos_token_id, "pad": config.pad_token_id}
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(WORLD / "pipeline" / "tokenizer"),
        max_length=length,
        embedding_size=config.hidden_size,
    )
    network = partial(
        comfy.sd1_clip.SDClipModel,
        textmodel_json_config=config.to_dict(),
        max_length=length,
        special_tokens=special,
        return_projected_pooled=False,
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=network),
    )
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    part = clip.cond_stage_model.clip_l
    # ComfyUI makes room for CLIP's vocabulary, whatever the configuration says
    part.transformer.set_input_embeddings(part.operations.Embedding(config.vocab_size, config.hidden_size))
    state = {f"text_model.{k.removeprefix('text_model.')}": w for k, w in text_encoder.state_dict().items()}
    part.transformer.load_state_dict(state | {"text_projection.weight": torch.eye(config.hidden_size)})
    return clip


def _set_groups(network: nn.Module, groups: int) -> None:
    """ComfyUI makes every GroupNorm with 32 groups; the weights do not tell how many there were."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups
