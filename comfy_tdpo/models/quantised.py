"""Weights that are stored as codes: float8 with its scales is multiplied out, every other scheme is refused by name.

float8 weights without any scale are numbers like others, and are only cast.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

FLOAT8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith(("float8_e4m3", "float8_e5m2")))

# X.weight's scale in ComfyUI's older format, and in its newer one and diffusers'.
_SCALE = re.compile(r"(?<=\.)(?:scale_weight|weight_scale)$")
# These do not change the weights: markers, and scales of a layer's inputs for arithmetic in float8.
_NO_WEIGHT = re.compile(r"(?:^|\.)(?:scaled_fp8|scale_input|input_scale|comfy_quant)$")

_SCHEMES = {
    r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.": "bitsandbytes in 4 bits",
    r"\.(SCB|weight_format)$": "bitsandbytes in 8 bits",
    r"\.(qweight|qzeros|g_idx|scales)$": "GPTQ or AWQ",
    r"\.(wscales|wcscales|wtscale|smooth_factor|smooth)$": "SVDQuant",
    r"\.(weight|bias)\._(data|scale|shift)$": "Quanto",
    r"\.(weight|input|output)_quantizer\.": "ModelOpt",
    r"\.weight_scale_2$": "nvfp4",
    r"(?<!logit)[._]scale(_inv|_\d+)?$|zero_point$|\.amax$": "a scheme with scales of its own",
}


def find_scales(names: Collection[str]) -> dict[str, str]:
    """The weights among `names` that have a scale -> its name. Raises ValueError for another scheme's tensors."""
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
    """Raises ValueError where a layer's declared format is not float8, or its scale is missing."""
    for layer, form in formats.items():
        if not form.startswith(("float8_e4m3", "float8_e5m2")):
            raise ValueError(f"{form} ({layer})")
        if f"{layer}.weight" not in scales:
            raise ValueError(f"{form} without {layer}.weight_scale")


def declared_formats(
    names: Iterable[str], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """What ComfyUI's newer format says of each layer, in the header or in a tensor X.comfy_quant of JSON."""
    try:
        said = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        suffix = ".comfy_quant"
        marked = {name.removesuffix(suffix): read(name) for name in names if name.endswith(suffix)}
        said |= {layer: json.loads(bytes(octets.flatten().tolist())) for layer, octets in marked.items()}
        return {layer: str(entry["format"]) for layer, entry in said.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"a description of its format that cannot be read: {error}") from error


def multiply_out(weight: Tensor, scale: Tensor) -> Tensor:
    """float32: `weight`, of codes in float8, times its `scale`, one number or one for each row."""
    rows = (len(weight), *(1,) * (weight.ndim - 1)) if weight.ndim else ()
    sound = scale.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if weight.dtype not in FLOAT8 or not sound or tuple(scale.shape) not in ((), (1,), (len(weight),), rows):
        raise ValueError(
            f"a scale of {_of(scale)} for a weight of {_of(weight)}, where float8 has one number, or one for each row"
        )
    return weight.float() * (scale.float() if scale.numel() == 1 else scale.float().view(rows))


def _of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
