"""Decodes latents as a VAE of ComfyUI does, without ComfyUI.

The training thread must not ask ComfyUI for anything: from 0.3.65 on, every layer of `comfy.ops` asks whether the user
has cancelled, and takes the answer away from the executor, which waits for it.
"""

import copy

import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from .weights_in import check_decoder


class ComfyDecoder:
    """A LatentDecoder: a copy of the network in a VAE, in main memory until it is moved.

    Args:
        vae: the VAE; model: the MODEL, which defines how latents are scaled.

    Raises:
        ValueError: the two do not belong together, or a weight is not finite.
    """

    def __init__(self, vae: comfy.sd.VAE, model: comfy.model_patcher.ModelPatcher):
        vae.throw_exception_if_invalid()
        got, expected = vae.latent_channels, model.model.latent_format.latent_channels
        if got != expected:
            raise ValueError(
                f"got a VAE with {got} latent channels; expected {expected}: use the VAE of the MODEL's checkpoint"
            )
        check_decoder(vae.first_stage_model)
        self.factor, self._dtype = vae.downscale_ratio, vae.vae_dtype
        self._process_output, self._process_latents = vae.process_output, model.model.latent_format.process_out
        with torch.inference_mode(False):
            self.network = copy.deepcopy(vae.first_stage_model).requires_grad_(False).cpu()
        for name in ("encoder", "taesd_encoder", "quant_conv"):  # it only decodes
            if hasattr(self.network, name):
                setattr(self.network, name, None)
        make_plain(self.network)

    def to(self, device: torch.device) -> "ComfyDecoder":
        self.network.to(device)
        return self

    def __call__(self, latents: Tensor) -> Tensor:
        pixels = self.network.decode(self._process_latents(latents).to(self._dtype))
        return self._process_output(pixels.float())


def make_plain(network: nn.Module) -> None:
    """Give each layer of `comfy.ops` in `network` the class of torch that it derives from, and attention ours."""
    for module in network.modules():
        kind = type(module)
        if kind.__module__ == "comfy.ops":
            module.__class__ = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules"))
        if hasattr(module, "optimized_attention"):  # ComfyUI's own asks how much memory is free
            module.optimized_attention = attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each position to all, over one head; all (B, C, H, W)."""
    flat = [part.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for part in (q, k, v)]
    return nn.functional.scaled_dot_product_attention(*flat).squeeze(1).transpose(1, 2).reshape(q.shape)
