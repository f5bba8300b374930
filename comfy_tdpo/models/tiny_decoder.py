"""Tiny decoders, which imitate the decoder of a model's autoencoder in a fraction of its time: TAESD.

Files have the layout of TAESD itself, as in ComfyUI's models/vae_approx ("1.weight", "3.conv.0.weight", ...), or that
of diffusers' AutoencoderTiny ("decoder.layers.0.weight", ...). Their widths and depths are read from their weights.

Shapes: B batch, C H W latent, h w image.
"""

import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from ..tensor_files import TensorFile, first_sentence
from ..user_files import user_path
from .files import PICKLE_SUFFIXES
from .weights import check_finite

EXPECTED = (
    "expected a tiny decoder of the model's own latents, such as taesd_decoder.safetensors for Stable Diffusion 1.x "
    "and 2.x, taesdxl_decoder for XL, taesd3_decoder for 3 and 3.5, and taef1_decoder for FLUX.1 and Z-Image"
)
_IN_DIFFUSERS = re.compile(r"decoder\.layers\.(\d+\..+)")
_ORIGINAL = re.compile(r"\d+\..+")


class TinyDecoder:
    """A LatentDecoder: the decoder of a TAESD, (B, C, H, W) to (B, 3, h, w).

    network: diffusers' DecoderTiny; channels: C.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        first, *others = (layer for layer in network.layers if isinstance(layer, nn.Conv2d))
        self.channels, self.factor = first.in_channels, 2 ** (len(others) - 1)

    def __call__(self, latents: Tensor) -> Tensor:
        pixels = self.network(latents.to(next(self.network.parameters()).dtype))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def new_tiny_decoder(channels: int, width: int, blocks: tuple[int, ...]) -> nn.Module:
    """diffusers' DecoderTiny of latents of `channels`, with `blocks` residual blocks at each resolution."""
    stages = len(blocks)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(1,) * stages,  # it is thrown away
        num_encoder_blocks=(1,) * stages,
        decoder_block_out_channels=(width,) * stages,
        num_decoder_blocks=blocks,
        latent_channels=channels,
    )
    return tiny.decoder


def load_tiny_decoder(file: str | Path, dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """The decoder in `file`, frozen, on the CPU.

    Raises:
        ValueError: there is no such file, or it holds no such decoder.
    """
    path = user_path(file)
    weights = _read(path)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    try:
        with init_empty_weights():
            network = new_tiny_decoder(*_sizes(shapes))
        fits = shapes == {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    except (KeyError, ValueError, IndexError, RuntimeError):  # weights that are none of a decoder's
        fits = False
    if not fits:
        raise ValueError(f"got '{path}', which holds something else than a tiny decoder; {EXPECTED}")
    copies = {name: weight.to(dtype, copy=True) for name, weight in weights.items()}
    for name, copy in copies.items():
        check_finite(copy, weights[name], f"{name} in '{path}'")
    network.load_state_dict(copies, assign=True)
    return TinyDecoder(network.eval().requires_grad_(False))


def original_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a DecoderTiny in TAESD's own layout, whose first layer, a clamp, is none of diffusers' layers."""
    numbered = (name.removeprefix("layers.").split(".", 1) for name in network.state_dict())
    return {f"{int(i) + 1}.{rest}": network.state_dict()[f"layers.{i}.{rest}"] for i, rest in numbered}


def check_tiny_decoder(decoder: TinyDecoder, file: Path, channels: int, factor: int) -> None:
    """Raise ValueError if `decoder`, from `file`, is not for latents of `channels`, `factor` pixels an element."""
    got, wanted = (decoder.channels, decoder.factor), (channels, factor)
    if got != wanted:
        told = "{} channels and {} pixels an element"
        raise ValueError(
            f"got '{file}', which decodes latents of {told.format(*got)}, for a model with latents of "
            f"{told.format(*wanted)}; {EXPECTED}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    """The weights of the decoder in a file, by their names in diffusers' DecoderTiny."""
    try:
        if path.suffix in PICKLE_SUFFIXES:
            tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            file = TensorFile(path)
            tensors = {name: file[name] for name in file.shapes}
    except Exception as error:  # torch raises all kinds of exceptions for files that are not checkpoints
        raise ValueError(f"got '{path}', which cannot be read: {first_sentence(error)}; {EXPECTED}") from error
    found = {}
    for name, tensor in tensors.items():
        if match := _IN_DIFFUSERS.fullmatch(name):
            found[f"layers.{match[1]}"] = tensor
        elif _ORIGINAL.fullmatch(name):
            number, rest = name.split(".", 1)
            found[f"layers.{int(number) - 1}.{rest}"] = tensor
    return found


def _sizes(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, tuple[int, ...]]:
    """Channels of the latents, width, and blocks at each resolution: a convolution ends each, and one comes before."""
    kinds = {}
    for name in shapes:
        _, number, rest = name.split(".", 2)
        if rest in ("weight", "conv.0.weight"):
            kinds[int(number)] = rest
    _, *kinds_in_order = [kinds[number] for number in sorted(kinds)]
    blocks, *more = "".join("c" if kind == "weight" else "b" for kind in kinds_in_order).split("c")
    width, channels, *_ = shapes["layers.0.weight"]
    return channels, width, tuple(map(len, (blocks, *more[:-1])))
