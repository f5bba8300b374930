"""Weights that are kept in another form than they stand for."""

import json
import warnings
from tempfile import NamedTemporaryFile
from types import SimpleNamespace

import comfy.ops
import numpy
import torch
from begin import CPU, difference, drawn, refusal
from small_models import both_ways, small_sd2
from torch import Tensor, nn

from comfy_tdpo.nodes.comfy import models_in
from comfy_tdpo.nodes.comfy.baked import baked_weights, model_name
from comfy_tdpo.nodes.comfy.weights_in import check_plain

LAYER = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
KEY = f"diffusion_model.{LAYER}.weight"


class Coded(Tensor):
    """As a later ComfyUI's QuantizedTensor: float8 codes and a scale; it claims another dtype and has no storage."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float, layout: str = "TensorCoreFP8E4M3Layout"):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, device=codes.device)

    def __init__(self, codes: Tensor, scale: float, layout: str = "TensorCoreFP8E4M3Layout"):
        self.codes, self.scale, self._layout_cls = codes, scale, layout

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten._to_copy, torch.ops.aten.clone), func
        return cls(args[0].codes.clone(), args[0].scale, args[0]._layout_cls)

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale


def quantised() -> dict[str, float | bool | str]:
    """How far what is read is from the codes times the scale, in every form in which a MODEL may keep a weight."""
    model, (codes, scale, change) = small_sd2(), quantised_parts()
    layer, truth = model.model.get_submodule(f"diffusion_model.{LAYER}"), codes.float() * scale
    plain_name = model_name(model)
    put(layer, Coded(codes, scale))
    list_more(layer)
    refuse_to_load(model)
    found: dict[str, float | bool | str] = {"coded": difference(read(model), truth)}
    found["copied"] = difference(read(model), truth)  # the first reading has changed nothing
    name = model_name(model)
    found["name"] = len({plain_name, name, model_name(model)}) == 2
    layer.convert_weight = lambda weight, inplace=False: weight.dequantize() if isinstance(weight, Coded) else weight
    found["converted by its layer"] = difference(read(model), truth)
    tuned = model.clone()
    tuned.add_patches({KEY: ("diff", (change,))}, 0.5)
    found["with a LoRA"] = difference(read(tuned), truth + 0.5 * change)
    model.backup[KEY] = SimpleNamespace(weight=layer.weight)
    put(layer, torch.full_like(truth, 7.0))
    found["patched meanwhile"] = difference(read(tuned), truth + 0.5 * change)
    found["name while patched"] = model_name(model) == name
    del model.backup[KEY]
    put(layer, Coded(codes, 2 * scale))
    found["name by the scale"] = model_name(model) != name
    put(layer, torch.empty(codes.shape, device="meta"))
    found["absent from the file"] = difference(read(tuned), 0.5 * change)
    model_name(model)
    del layer.convert_weight
    return found | {"read-only": difference(*mapped(model, layer))} | quantised_refusals(layer, codes, scale)


def quantised_parts() -> tuple[Tensor, float, Tensor]:
    """Codes in float8, their scale, and what a LoRA changes; codes alone would be far too large."""
    scale = 2.0**-9 * 1.25
    return (64 * drawn(64, 64)).to(torch.float8_e4m3fn), scale, 0.1 * drawn(64, 64)


def put(layer: nn.Module, weight: Tensor) -> None:
    del layer.weight
    layer.weight = nn.Parameter(weight, requires_grad=False)


def read(model) -> Tensor:
    return baked_weights(model, torch.float32)[f"{LAYER}.weight"]


def list_more(layer: nn.Module) -> None:
    """Its state_dict has names that are none of its attributes, which ComfyUI's get_key_patches cannot bear."""
    lists = layer.state_dict

    def state_dict(*args, **kwargs):
        listed = lists(*args, **kwargs)
        listed |= {f"{kwargs.get('prefix', '')}{name}": torch.ones(()) for name in ("weight_scale", "comfy_quant")}
        return listed

    layer.state_dict = state_dict


def refuse_to_load(model) -> None:
    def refuse(*_, **__):
        raise AssertionError("the MODEL was loaded")

    for name in ("load", "patch_model", "partially_load"):
        setattr(model, name, refuse)


def mapped(model, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What is read of a weight that is a view of a read-only file, to which the process cannot write, and its truth."""
    truth = drawn(64, 64)
    with NamedTemporaryFile() as file, warnings.catch_warnings(action="ignore"):  # torch warns of read-only memory
        truth.numpy().tofile(file.name)
        view = torch.from_numpy(numpy.memmap(file.name, numpy.float32, mode="r", shape=(64, 64)))
        layer.weight = nn.Parameter(view, requires_grad=False)
        layer.convert_weight = lambda weight, inplace=False: weight.mul_(2) if inplace else weight * 2
        found = read(model)
        model_name(model)
        put(layer, truth)
        del layer.convert_weight
    return found, 2 * truth


def quantised_refusals(layer: nn.Module, codes: Tensor, scale: float) -> dict[str, str]:
    found = {}
    for kind in ("TensorCoreNVFP4Layout", "TensorCoreMXFP8Layout", "TensorWiseINT8Layout", "TensorCoreFP8E5M2Layout"):
        put(layer, Coded(codes, scale, kind))
        found[kind] = refusal(lambda: check_plain(layer))
    put(layer, codes)
    layer.weight.tensor_type = SimpleNamespace(name="Q4_0")  # as the GGUF nodes' tensors say what their bytes are
    found["GGUF"] = refusal(lambda: check_plain(layer))
    put(layer, codes)
    found["float8"] = refusal(lambda: check_plain(layer))
    layer.scale_weight = torch.tensor(scale)
    found["float8 of another loader"] = refusal(lambda: check_plain(layer))
    return found


def scaled() -> dict[str, float | bool]:
    """The same for a MODEL that ComfyUI itself has made of a file in scaled float8, with the layers of its version."""
    network = small_sd2().model.diffusion_model
    plain = network.state_dict()
    truth, state = dict(plain), dict(plain)
    for name in [f"{path}.weight" for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]:
        scale = plain[name].abs().max() / 448
        state[name] = (plain[name] / scale).to(torch.float8_e4m3fn)
        truth[name] = state[name].float() * scale
        state |= scale_entries(name, scale)
    model = small_sd2(quantised=True)
    model.model.diffusion_model.load_state_dict(state)
    kept = model.model.diffusion_model.get_parameter(f"{LAYER}.weight")
    change = 0.1 * drawn(64, 64)
    tuned = model.clone()
    tuned.add_patches({KEY: ("diff", (change,))}, 0.5)
    found = {"plain": furthest(model, truth), "name": model_name(model) != model_name(tuned)}
    name, weight = model_name(tuned), f"{LAYER}.weight"
    tuned_truth = truth | {weight: truth[weight] + 0.5 * change}
    found["with a LoRA"] = furthest(tuned, tuned_truth)
    found |= both_ways(model, models_in.diffusers_unet(model), drawn(2, 4, 16, 16), drawn(2, 7, 48))
    tuned.patch_model(device_to=CPU)
    found["while loaded"] = furthest(tuned, tuned_truth)
    found["name while loaded"] = model_name(tuned) == name
    tuned.unpatch_model(device_to=CPU)
    codes = getattr(kept, "_qdata", kept)
    found["the codes are as before"] = bool((codes.float() == state[weight].float()).all())
    return found


def furthest(model, truth: dict[str, Tensor]) -> float:
    baked = baked_weights(model, torch.float32)
    return max(difference(baked[name], weight) for name, weight in truth.items())


def scale_entries(name: str, scale: Tensor) -> dict[str, Tensor]:
    """What a file has beside a weight in float8, as each version of ComfyUI reads it."""
    if hasattr(comfy.ops, "scaled_fp8_ops"):
        return {name.removesuffix("weight") + "scale_weight": scale}
    form = list(json.dumps({"format": "float8_e4m3fn"}).encode())
    return {f"{name}_scale": scale, name.removesuffix("weight") + "comfy_quant": torch.tensor(form, dtype=torch.uint8)}
