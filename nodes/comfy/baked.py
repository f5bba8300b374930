"""Copies of a MODEL's weights in float32, in whatever form ComfyUI keeps them, with its LoRAs baked in; and its name.

ComfyUI may hold a weight quantised, read it from its file only when it is used, or put a patched one in its place and
keep the original elsewhere. So nothing is loaded, moved or written here: each weight is copied, then made plain.
"""

import hashlib
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import comfy.lora
import comfy.model_patcher
import torch
from torch import Tensor, nn

from comfy_tdpo.models import OF_GRAPH

from .weights_in import check_baked, layout_of

NETWORK = "diffusion_model"  # of a MODEL's `model`, and what the keys of its patches start with


def baked_weights(model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the network's weights, patched in float32 as ComfyUI would patch them, in `dtype` on the CPU.

    Raises:
        ValueError: one is not finite.
    """
    weights = {}
    for key, stored, patches in _stored(model):
        weight, name = _plain(model, key, stored), key.removeprefix(f"{NETWORK}.")
        baked = comfy.lora.calculate_weight(patches, weight.clone(), key) if patches else weight
        check_baked(weight, baked, dtype, name)
        weights[name] = baked.to(dtype)
    return weights


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """The name of a MODEL in a run's configuration: its family and a digest of its weights and the LoRAs on them.

    It tells models apart, but no model can be loaded by it.
    """
    digest = hashlib.sha256()
    for key, stored, patches in _stored(model):
        readable = _plain(model, key, stored) if layout_of(stored) or stored.is_meta else stored
        for value in _values((key, readable, patches)):
            digest.update(value)
    return f"{OF_GRAPH}{type(model.model.model_config).__name__}:{digest.hexdigest()[:12]}"


def _values(part: Any) -> Iterator[bytes]:
    """What identifies a weight or a patch: the first values of each tensor, and every number."""
    if isinstance(part, Tensor):
        yield part.flatten()[:256].float().cpu().numpy().tobytes()
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _values(item)
    elif hasattr(part, "weights"):  # of a LoRA
        yield from _values(part.weights)
    elif isinstance(part, int | float | str):
        yield repr(part).encode()


# --- what ComfyUI keeps -----------------------------------------------------------------------------------------------


def _stored(model: comfy.model_patcher.ModelPatcher) -> Iterator[tuple[str, Tensor, list]]:
    """The key of each weight of the network, the weight as it is kept, without any patch, and the patches on it."""
    with model.use_ejected():
        network: nn.Module = getattr(model.model, NETWORK)
        parameters = network.named_parameters(NETWORK, remove_duplicate=False)
        weights = dict([*parameters, *network.named_buffers(NETWORK, remove_duplicate=False)])
    for key, weight in weights.items():
        yield key, _unpatched(model, key, weight), model.patches.get(key, [])


def _unpatched(model: comfy.model_patcher.ModelPatcher, key: str, weight: Tensor) -> Tensor:
    """The weight as it was before ComfyUI patched it, for sampling or by a hook."""
    if key in model.hook_backup:
        return model.hook_backup[key][0]
    return model.backup[key].weight if key in model.backup else weight


def _plain(model: comfy.model_patcher.ModelPatcher, key: str, stored: Tensor) -> Tensor:
    """A copy of a weight in float32 on the CPU: what it stands for, not how it is stored."""
    if stored.is_meta:  # its file has no such weight, and ComfyUI calculates with zeros
        return torch.zeros(stored.shape)
    copy = stored.to("cpu", torch.float32, copy=True)
    path, name = key.rsplit(".", 1)
    if convert := getattr(attrgetter(path)(model.model), f"convert_{name}", None):
        copy = convert(copy, inplace=True)
    return (copy.dequantize() if layout_of(copy) else copy).float()
