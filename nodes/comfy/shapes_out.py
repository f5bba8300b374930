"""The Shapes model as native MODEL, CLIP and VAE, for ComfyUI's own sampler, encoder and decoder."""

from dataclasses import replace
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
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from comfy_tdpo.models import load_model
from comfy_tdpo.models.kind import SHAPES_FLOW
from comfy_tdpo.shapes import MODELS, WORLD

from . import sd3_in
from .encoded import EncodedPrompts
from .native import put


class Multiple(float):
    """A fractional channel multiple that gives a whole number of channels: 1.5 times 64 is 96."""

    def __mul__(self, channels: int) -> int:  # type: ignore[override]
        return int(float(self) * channels)

    __rmul__ = __mul__  # type: ignore[assignment]


class ShapesConfig(comfy.supported_models.SD15):
    """The model family of the U-Net of Shapes: Stable Diffusion 1.x, but narrower."""

    unet_config: dict = {}
    unet_extra_config: dict = {}


class ShapesFlowConfig(comfy.supported_models.SD3):
    """The model family of the flow transformer of Shapes: Stable Diffusion 3, but narrower, and without a shift."""

    unet_config: dict = {}
    sampling_settings = {"shift": 1.0}


def is_shapes(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether a MODEL is the U-Net of Shapes."""
    return isinstance(model.model.model_config, ShapesConfig)


# How the flow transformer becomes ours.
FLOW = replace(
    sd3_in.NATIVE,
    recognizes=lambda model: isinstance(model.model.model_config, ShapesFlowConfig),
    preset=lambda model: SHAPES_FLOW,
    encode=lambda model, clip, texts, device: EncodedPrompts(clip, texts, device, pooled=True, joint=True),
)


def shapes_native(name: str = "shapes") -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the model `name` of Shapes in float32, for ComfyUI's own sampler, encoder and decoder."""
    ours = load_model(str(MODELS[name]), torch.float32)
    vae = ours.networks["vae"]
    latent_format = comfy.latent_formats.SD15(scale_factor=vae.config.scaling_factor)
    convert = _native_transformer if isinstance(ours.network, SD3Transformer2DModel) else _native_unet
    model = comfy.model_patcher.ModelPatcher(
        convert(ours.network, latent_format),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return model, _native_clip(ours.networks["text_encoder"]), _native_vae(vae)


def _native_unet(unet: UNet2DConditionModel, latent_format: comfy.latent_formats.SD15) -> Any:
    family = ShapesConfig(comfy_config(unet))
    model = _new_model(family, latent_format)
    names = comfy.utils.unet_to_diffusers(family.unet_config)
    state = unet.state_dict()
    model.diffusion_model.load_state_dict({names[name]: weight for name, weight in state.items()})
    _set_groups(model.diffusion_model, unet.config.norm_num_groups)
    return model


def _native_transformer(transformer: SD3Transformer2DModel, latent_format: comfy.latent_formats.SD15) -> Any:
    family = ShapesFlowConfig(comfy_transformer_config(transformer))
    model = _new_model(family, latent_format)
    places = comfy.utils.mmdit_to_diffusers(family.unet_config)
    state = model.diffusion_model.state_dict()
    for name, weight in transformer.state_dict().items():
        put(state, places[name], weight)
    return model


def _new_model(family: Any, latent_format: comfy.latent_formats.SD15) -> Any:
    """ComfyUI's model of a family, in float32, whose weights are not set yet."""
    family.set_inference_dtype(torch.float32, None)
    family.latent_format = latent_format
    return family.get_model({}, device=comfy.model_management.unet_offload_device())


def comfy_transformer_config(transformer: SD3Transformer2DModel) -> dict:
    """The inverse of `sd3_in.transformer_config`: ComfyUI's configuration for a transformer of diffusers."""
    config = transformer.config
    text = {"in_features": config.joint_attention_dim, "out_features": config.caption_projection_dim}
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "depth": config.num_layers,
        "input_size": None,
        "adm_in_channels": config.pooled_projection_dim,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": text},
        "num_patches": config.pos_embed_max_size**2,
        "pos_embed_max_size": config.pos_embed_max_size,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [],
    }


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
