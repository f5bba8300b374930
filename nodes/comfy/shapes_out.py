"""The Shapes model as native MODEL, CLIP and VAE, for ComfyUI's own sampler, encoder and decoder."""

from functools import partial
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from comfy_tdpo.models.components import Components, load_components
from comfy_tdpo.shapes import WORLD


class Multiple(float):
    """A fractional channel multiple that gives a whole number of channels: 1.5 times 64 is 96."""

    def __mul__(self, channels: int) -> int:  # type: ignore[override]
        return int(float(self) * channels)

    __rmul__ = __mul__  # type: ignore[assignment]


class ShapesConfig(comfy.supported_models.SD15):
    """The model family of the U-Net of Shapes: Stable Diffusion 1.x, but narrower."""

    unet_config: dict = {}
    unet_extra_config: dict = {}


def is_shapes(model: comfy.model_patcher.ModelPatcher) -> bool:
    return isinstance(model.model.model_config, ShapesConfig)


def shapes_native() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of Shapes in float32, for ComfyUI's own sampler, encoder and decoder."""
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
    """The inverse of `models_in.diffusers_config`: ComfyUI's configuration for a U-Net of diffusers."""
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
    ours = {
        "textmodel_json_config": config.to_dict(),
        "max_length": length,
        "special_tokens": special,
        "return_projected_pooled": False,
    }

    def network(**given: Any) -> comfy.sd1_clip.SDClipModel:
        return comfy.sd1_clip.SDClipModel(**(given | ours))  # some versions give a textmodel_json_config of None

    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=network),
    )
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    part = clip.cond_stage_model.clip_l
    # ComfyUI creates an embedding for CLIP's vocabulary, whatever the configuration says
    part.transformer.set_input_embeddings(part.operations.Embedding(config.vocab_size, config.hidden_size))
    state = {f"text_model.{k.removeprefix('text_model.')}": w for k, w in text_encoder.state_dict().items()}
    part.transformer.load_state_dict(state | {"text_projection.weight": torch.eye(config.hidden_size)})
    return clip


def _set_groups(network: nn.Module, groups: int) -> None:
    """Set the number of groups: ComfyUI makes every GroupNorm with 32, and the weights do not reveal it."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups
