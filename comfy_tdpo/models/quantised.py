"""Quantised weights: float8 weights with scales are dequantised; every other scheme is rejected by name.

float8 weights without scales are ordinary numbers and only need a cast.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

FLOAT8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith(("float8_e4m3", "float8_e5m2")))

# The scale of X.weight: in ComfyUI's older format, and in its newer format and diffusers'.
_SCALE = re.compile(r"(?<=\.)(?:scale_weight|weight_scale)$")
# These do not affect the weights: markers, and scales of a layer's inputs for arithmetic in float8.
_NO_WEIGHT = re.compile(r"(?:^|\.)(?:scaled_fp8|scale_input|input_scale|comfy_quant)$")

_SCHEMES = {
    r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.": "bitsandbytes in 4 bits",
    r"\.(SCB|weight_format)$": "bitsandbytes in 8 bits",
    r"\.(qweight|qzeros|g_idx|scales)$": "GPTQ or AWQ",
    r"\.(wscales|wcscales|wtscale|smooth_factor|smooth)$": "SVDQuant",
    r"\.(weight|bias)\._(data|scale|shift)$": "Quanto",
    r"\.(weight|input|output)_quantizer\.": "ModelOpt",
    r"\.weight_scale_2$": "nvfp4",
    r"(?<!logit)(?<!_norm)[._]scale(_inv|_\d+)?$|zero_point$|\.amax$": "an unknown scheme with scales",
}


def find_scales(names: Collection[str]) -> dict[str, str]:
    """The name of each scaled weight among `names` -> the name of its scale. Raises ValueError for other schemes."""
    for name in names:
        if _NO_WEIGHT.search(name) or _SCALE.search(name):
            continue
        for pattern, scheme in _SCHEMES.items():
            if re.search(pattern, name):
                raise ValueError(f"{scheme} ({name})")
    scales = {_SCALE.sub("weight", name): name for name in names if _SCALE.search(name)}
    for weight, scale in scales.items():
        if weight not in names:
            raise ValueError(f"{scale} has no {weight}")
    return scales


def check_formats(formats: Mapping[str, str], scales: Mapping[str, str]) -> None:
    """Raise ValueError if a layer's declared format is not float8, or if its scale is missing."""
    for layer, form in formats.items():
        if not form.startswith(("float8_e4m3", "float8_e5m2")):
            raise ValueError(f"{form} ({layer})")
        if f"{layer}.weight" not in scales:
            raise ValueError(f"{form} without {layer}.weight_scale")


def declared_formats(
    names: Iterable[str], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Each layer's format in ComfyUI's newer scheme, from the header or from a tensor X.comfy_quant that holds JSON."""
    try:
        said = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        suffix = ".comfy_quant"
        marked = {name.removesuffix(suffix): read(name) for name in names if name.endswith(suffix)}
        said |= {layer: json.loads(bytes(octets.flatten().tolist())) for layer, octets in marked.items()}
        return {layer: str(entry["format"]) for layer, entry in said.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"a description of its format that cannot be read: {error}") from error


def multiply_out(weight: Tensor, scale: Tensor) -> Tensor:
    """The float8 `weight` times its `scale`, which is one number or one per row, in float32."""
    rows = (len(weight), *(1,) * (weight.ndim - 1)) if weight.ndim else ()
    sound = scale.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if weight.dtype not in FLOAT8 or not sound or tuple(scale.shape) not in ((), (1,), (len(weight),), rows):
        raise ValueError(
            f"a scale of {_of(scale)} for a weight of {_of(weight)}, where float8 needs one number, or one per row"
        )
    return weight.float() * (scale.float() if scale.numel() == 1 else scale.float().view(rows))


def _of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
