"""Whether the weights that come along a wire are numbers that can be trained on."""

import torch
from torch import Tensor, nn

from comfy_tdpo.models.weights import is_finite

ENCODER = ("encoder.", "taesd_encoder.", "quant_conv.")  # of a VAE; files without one leave these weights undefined


def check_plain(network: nn.Module) -> None:
    """Raise ValueError, naming the weight, where one of a MODEL's network is stored as codes that ComfyUI alone reads.

    float8 is no such code: it holds numbers, and where it has scales ComfyUI multiplies them in.
    """
    for name, weight in [*network.named_parameters(), *network.named_buffers()]:
        if how := _quantised(name, weight):
            raise ValueError(
                f"got a MODEL that is quantised: {name} is stored as {how}; expected weights in fp32, fp16, bf16 or "
                "float8: load the fp16 or bf16 version of its checkpoint"
            )


def _quantised(name: str, weight: Tensor) -> str:
    if layout := getattr(weight, "_layout_cls", None):  # of ComfyUI's QuantizedTensor, whatever its dtype says
        return getattr(layout, "__name__", str(layout))
    if kind := getattr(weight, "tensor_type", None):  # of the GGUF nodes
        return f"GGUF {getattr(kind, 'name', kind)}"
    if name.endswith(("weight", "bias")) and not weight.is_floating_point():
        return str(weight.dtype).removeprefix("torch.")
    return ""


def check_baked(wire_weight: Tensor, baked: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise ValueError where a MODEL's weight, float32, is not finite by itself, with its LoRAs, or in `dtype`."""
    if not is_finite(wire_weight):
        raise not_finite("MODEL", name, wire_weight)
    if not is_finite(baked):
        raise ValueError(
            f"got a LoRA on the MODEL that makes {name} NaN or infinite; expected finite weights: take that LoRA away, "
            "or fetch its file again"
        )
    if not is_finite(baked.to(dtype)):
        raise ValueError(f"got a MODEL whose {name} is too large for {dtype}; set precision to fp32")


def check_decoder(network: nn.Module) -> None:
    """Raise ValueError where the decoder of a VAE has a weight that is not finite."""
    for name, weight in network.state_dict().items():
        if not name.startswith(ENCODER) and not is_finite(weight):
            raise not_finite("VAE", name, weight)


def check_embeds(prompt: str, embeds: Tensor, network: nn.Module) -> None:
    """Raise ValueError where a CLIP encodes a prompt as what is not finite.

    Its `network` is searched only then: files may lack layers whose output nobody uses, and leave them undefined.
    """
    if is_finite(embeds):
        return
    for name, weight in network.state_dict().items():
        if weight.is_floating_point() and not is_finite(weight):
            raise not_finite("CLIP", name, weight)
    raise ValueError(
        f"got a CLIP that encodes the prompt {prompt[:60]!r} as NaN or infinity, though its weights are finite; "
        "take away LoRAs that are applied to it, or load it in fp32"
    )


def not_finite(wire: str, name: str, weight: Tensor) -> ValueError:
    count = int((~weight.float().isfinite()).sum())
    return ValueError(
        f"got a {wire} whose weight {name} holds NaN or infinity ({count} of {weight.numel()} values); expected finite "
        "weights; the file is damaged or comes from a merge that went wrong: fetch it again, or load another version"
    )
