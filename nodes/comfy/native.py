"""What is known of a family of MODELs; models_in lists the families."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import comfy.model_patcher
import torch
from torch import Tensor, nn

from comfy_tdpo.models.flow_transformer import FlowTransformer
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.process.flow_schedule import FlowSchedule

from .baked import baked_weights

Model: TypeAlias = comfy.model_patcher.ModelPatcher


@dataclass(frozen=True)
class Native:
    """How a MODEL of one family becomes a DiffusionModel.

    recognizes: whether a MODEL is of the family.
    preset: what suits the MODEL.
    widths: how wide the embeddings are that its network takes, and the pooled ones, or None if it takes none; raises
        ValueError if the MODEL cannot be trained.
    network: the network for diffusers, in a dtype on the CPU, with the LoRAs applied to the MODEL baked in.
    schedule: the noise schedule.
    encode: a PromptEncoder with `width` and `pooled_width`, given MODEL, CLIP, what to read for each prompt, and a
        device.
    kind: the class of DiffusionModel, made from network, schedule, encoder, decoder and name.
    """

    recognizes: Callable[[Model], bool]
    preset: Callable[[Model], str]
    widths: Callable[[Model], tuple[int, int | None]]
    network: Callable[[Model, torch.dtype], Any]
    schedule: Callable[[Model], Any]
    encode: Callable[[Model, Any, dict[str, str], torch.device], Any]
    kind: type[StableDiffusion] | type[FlowTransformer]


def converted(model: Model, dtype: torch.dtype, cls: Any, config: dict, places: dict[str, Any]) -> nn.Module:
    """The network of a MODEL as diffusers' `cls` of this `config`, in `dtype` on the CPU, with its LoRAs baked in.

    places: where each weight of diffusers is, by ComfyUI's map.
    Raises ValueError if a weight is not finite.
    """
    with torch.inference_mode(False), torch.no_grad():
        weights = baked_weights(model, dtype)
        with torch.device("meta"):  # skips initialising weights that are replaced anyway
            network = cls(**config)
        network.load_state_dict({name: _taken(weights, places[name]) for name in network.state_dict()}, assign=True)
    return network.eval()


def _taken(weights: dict[str, Tensor], place: str | tuple) -> Tensor:
    """The weight at a `place` of ComfyUI's map: a name, or a name, what to cut out of it, and what to make of it."""
    if isinstance(place, str):
        return weights[place]
    name, cut, *made = place
    weight = weights[name].narrow(*cut).clone() if cut else weights[name]
    return made[0](weight) if made else weight


@torch.no_grad()
def put(weights: dict[str, Tensor], place: str | tuple, weight: Tensor) -> None:
    """Copy a `weight` of diffusers to its `place` among ComfyUI's `weights`: the inverse of `_taken`."""
    if isinstance(place, str):
        weights[place].copy_(weight)
        return
    name, cut, *made = place
    part = weights[name].narrow(*cut) if cut else weights[name]
    part.copy_(made[0](weight) if made else weight)  # what ComfyUI makes of a weight is its own inverse


def flow_schedule_of(model: Model, family: str, node: str) -> FlowSchedule:
    """The noise levels of a MODEL of `family`, whose shift ComfyUI's `node` may have changed.

    Raises:
        ValueError: another node has replaced them.
    """
    sampling = model.get_model_object("model_sampling")
    bases = {base.__name__ for base in type(sampling).__mro__}
    if not {"CONST", "ModelSamplingDiscreteFlow"} <= bases:
        raise ValueError(
            f"got a MODEL of {family} with other noise levels ({', '.join(sorted(bases))}); expected those of flow "
            f"matching: disconnect the node that changes its sampling, or use {node}"
        )
    return FlowSchedule(float(sampling.shift), int(sampling.multiplier))
