"""Models of the published sizes without weights or tokenizers, from the configurations that come with the package.

They are for counting memory: their prompts are encoded to zeros of the right shape.

Shapes: B batch, L tokens, E text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Qwen3Model, T5EncoderModel

from ..process.flow_schedule import FlowSchedule
from . import DiffusionModel
from .conditioning import Conditioning, ListConditioning, TensorConditioning
from .diffusers_folder import empty_network
from .files import naming, read_json
from .flux import T5_TOKENS, Flux
from .stable_diffusion import Autoencoder, StableDiffusion
from .stable_diffusion_3 import T5_TOKENS as T5_TOKENS_OF_SD3
from .stable_diffusion_3 import StableDiffusion3
from .z_image import ZImage

CLIP_TOKENS = 77  # read of a prompt
QWEN_TOKENS = 96  # of a prompt of some 70 words with its template

_TEXTS: dict[str, Any] = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    "T5EncoderModel": T5EncoderModel,
    "Qwen3ForCausalLM": Qwen3Model,
}


def _unet(folder: Path, unet: Any, encode: Any, decode: Any, source: str) -> DiffusionModel:
    with unset_fake_temporarily():
        scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler"))
    return StableDiffusion(unet, scheduler, encode, decode, source)


def _flow(cls: Any) -> Callable[..., DiffusionModel]:
    return lambda _, transformer, encode, decode, source: cls(transformer, FlowSchedule(), encode, decode, source)


def _states_of_unet(config: Any) -> Conditioning:
    states = torch.zeros(1, CLIP_TOKENS, config.cross_attention_dim)
    if config.addition_embed_type is None:
        return TensorConditioning(states=states)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return TensorConditioning(states=states, pooled=torch.zeros(1, pooled))


def _states_of_sd3(config: Any) -> Conditioning:
    states = torch.zeros(1, CLIP_TOKENS + T5_TOKENS_OF_SD3, config.joint_attention_dim)
    return TensorConditioning(states=states, pooled=torch.zeros(1, config.pooled_projection_dim))


def _states_of_flux(config: Any) -> Conditioning:
    states = torch.zeros(1, T5_TOKENS[config.guidance_embeds], config.joint_attention_dim)
    return TensorConditioning(states=states, pooled=torch.zeros(1, config.pooled_projection_dim))


def _states_of_z_image(config: Any) -> Conditioning:
    return ListConditioning([torch.zeros(QWEN_TOKENS, config.cap_feat_dim)])


# class of the denoiser, in its configuration -> the class, the model that it is part of, the conditioning of a prompt
_DENOISERS: dict[str, tuple[Any, Callable[..., DiffusionModel], Callable[[Any], Conditioning]]] = {
    "UNet2DConditionModel": (UNet2DConditionModel, _unet, _states_of_unet),
    "SD3Transformer2DModel": (SD3Transformer2DModel, _flow(StableDiffusion3), _states_of_sd3),
    "FluxTransformer2DModel": (FluxTransformer2DModel, _flow(Flux), _states_of_flux),
    "ZImageTransformer2DModel": (ZImageTransformer2DModel, _flow(ZImage), _states_of_z_image),
}


def is_countable(configs: Path) -> bool:
    """Whether `model_without_weights` can make the model that is configured in the folder `configs`."""
    denoisers = [configs / name / "config.json" for name in ("unet", "transformer")]
    return any(path.is_file() and str(read_json(path).get("_class_name")) in _DENOISERS for path in denoisers)


def model_without_weights(folder: Path, weights: torch.dtype, denoiser: torch.dtype, source: str) -> DiffusionModel:
    """The model `source`, configured in `folder`, whose text encoders are left out, its `denoiser` and other `weights`
    in these dtypes.

    Call it under FakeTensorMode, where weights take no memory.

    Raises:
        ValueError: a configuration is damaged.
    """
    part = folder / ("unet" if (folder / "unet").is_dir() else "transformer")
    with naming(part / "config.json"):
        config = UNet2DConditionModel.load_config(part)
        cls, made_of, states = _DENOISERS[config["_class_name"]]
        with weights_of_dtype(denoiser):
            network = cls.from_config(config)
        conditioning = states(network.config)
    with naming(folder / "vae" / "config.json"), weights_of_dtype(weights):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))

    def encode(prompts: list[str]) -> Conditioning:
        return conditioning.expand(len(prompts))

    return made_of(folder, network, encode, Autoencoder(vae.requires_grad_(False).eval()), source)


def numbers_of_texts(folder: Path, absent: Container[str] = ()) -> int:
    """How many numbers the weights of the text encoders are that are configured in `folder`, without those `absent`.

    Raises:
        ValueError: a configuration is damaged.
    """
    count = 0
    for path in folder.glob("text_encoder*/config.json"):
        if path.parent.name not in absent:
            with naming(path):
                network = empty_network(path.parent, _TEXTS[read_json(path)["architectures"][0]])
                network.tie_weights()  # a weight with two names counts once
            count += sum(weight.numel() for weight in network.parameters())
    return count


@contextmanager
def weights_of_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, new weights have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
