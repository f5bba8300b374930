"""Checks the weights of a MODEL, CLIP or VAE: they must be finite, and numbers that can be read without ComfyUI."""

import torch
from torch import Tensor, nn

from comfy_tdpo.models.weights import is_finite

# ComfyUI's names for float8 with one scale; others are refused by their names, such as TensorCoreNVFP4Layout
FLOAT8_LAYOUTS = ("TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout", "TensorCoreFP8E5M2Layout")
ENCODER = ("encoder.", "taesd_encoder.", "quant_conv.")  # of a VAE; undefined if its file has no encoder


def check_plain(network: nn.Module) -> None:
    """Raise ValueError, which names the weight, if a MODEL's network is quantised in a way that cannot be undone.

    float8 is accepted: its values are ordinary numbers, which are multiplied by their scales, if there are any.
    """
    for path, module in network.named_modules():
        for name, weight in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if how := _quantised(module, name, weight):
                raise ValueError(
                    f"got a MODEL that is quantised: {path}.{name} is stored as {how}; expected weights in fp32, fp16, "
                    "bf16 or float8: load the fp16 or bf16 version of its checkpoint"
                )


def _quantised(module: nn.Module, name: str, weight: Tensor) -> str:
    if layout := layout_of(weight):
        return "" if layout in FLOAT8_LAYOUTS else layout
    if kind := getattr(weight, "tensor_type", None):  # of the GGUF nodes
        return f"GGUF {getattr(kind, 'name', kind)}"
    if name.endswith(("weight", "bias")) and not weight.is_floating_point():
        return str(weight.dtype).removeprefix("torch.")
    return _scaled_elsewhere(module) if name == "weight" and weight.element_size() == 1 else ""


def layout_of(weight: Tensor) -> str:
    """The kind of a QuantizedTensor of ComfyUI, whatever its dtype says; empty for any other tensor."""
    layout = getattr(weight, "_layout_cls", None) or getattr(weight, "_layout_type", "")  # the latter in late 2025
    return getattr(layout, "__name__", str(layout))


def _scaled_elsewhere(module: nn.Module) -> str:
    """What a layer's float8 codes need that ComfyUI's `convert_weight` would not give them; empty if nothing."""
    if hasattr(module, "convert_weight"):
        return ""
    scales = [name for name in ("scale_weight", "weight_scale") if getattr(module, name, None) is not None]
    return f"float8 with a {scales[0]} that only its own loader can apply" if scales else ""


def check_baked(wire_weight: Tensor, baked: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise ValueError if a weight of a MODEL, float32, is not finite.

    wire_weight: as it is in the MODEL; baked: the same with the MODEL's LoRAs applied, which must be finite in `dtype`
    too.
    """
    if not is_finite(wire_weight):
        raise not_finite("MODEL", name, wire_weight)
    if not is_finite(baked):
        raise ValueError(
            f"got a LoRA on the MODEL that makes {name} NaN or infinite; expected finite weights: remove that LoRA, "
            "or download its file again"
        )
    if not is_finite(baked.to(dtype)):
        raise ValueError(f"got a MODEL whose {name} is too large for {dtype}; set precision to fp32")


def check_decoder(network: nn.Module) -> None:
    """Raise ValueError if the decoder of a VAE has a weight that is not finite."""
    for name, weight in network.state_dict().items():
        if not name.startswith(ENCODER) and not is_finite(weight):
            raise not_finite("VAE", name, weight)


def check_embeds(prompt: str, embeds: Tensor, network: nn.Module) -> None:
    """Raise ValueError if the embedding of a prompt is not finite; the message names a weight of the CLIP if it can.

    The weights of its `network` are checked only then, because a file may lack layers whose output is never used, and
    these are left undefined.
    """
    if is_finite(embeds):
        return
    for name, weight in network.state_dict().items():
        if weight.is_floating_point() and not is_finite(weight):
            raise not_finite("CLIP", name, weight)
    raise ValueError(
        f"got a CLIP that encodes the prompt {prompt[:60]!r} as NaN or infinity, though its weights are finite; "
        "remove LoRAs that are applied to it, or load it in fp32"
    )


def not_finite(wire: str, name: str, weight: Tensor) -> ValueError:
    count = int((~weight.float().isfinite()).sum())
    return ValueError(
        f"got a {wire} whose weight {name} holds NaN or infinity ({count} of {weight.numel()} values); expected finite "
        "weights; the file is damaged or comes from a failed merge: download it again, or load another version"
    )
