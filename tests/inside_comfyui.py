"""Runs under ComfyUI's own Python, not under pytest: prints as JSON how far its models are from ours.

python tests/inside_comfyui.py CHECKOUT
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKOUT = sys.argv.pop(1)
sys.path[:0] = [CHECKOUT, str(ROOT)]
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402

from comfy_tdpo.loading import load_components  # noqa: E402
from comfy_tdpo.nodes import native  # noqa: E402
from comfy_tdpo.policy import Autoencoder, ClipText  # noqa: E402
from comfy_tdpo.shapes import WORLD  # noqa: E402

PROMPTS = ["a red circle", "two blue squares on a green background"]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def shapes() -> dict[str, float]:
    """The world of Shapes as it lies on disk, as native models, and back."""
    ours = load_components(str(WORLD / "pipeline"))
    model, clip, vae = native.shapes_native()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([10, 700])
    embeds = ClipText(ours.tokenizer, ours.text_encoder)(PROMPTS)
    expected = ours.unet(latents, timesteps, embeds).sample
    decoder = native.ComfyDecoder(vae, model, torch.device("cpu"))
    images = Autoencoder(ours.vae)(latents)
    return {
        "text": difference(native.EncodedPrompts(clip, PROMPTS, torch.device("cpu"))(PROMPTS), embeds),
        "native unet": difference(model.model.diffusion_model(latents, timesteps, context=embeds), expected),
        "unet from native": difference(native.diffusers_unet(model)(latents, timesteps, embeds).sample, expected),
        "decoder": difference(decoder(latents), images),
        "native vae": difference(vae.decode(model.model.process_latent_out(latents)).permute(0, 3, 1, 2), images),
        "alpha_bar": difference(native.scheduler_of(model).alphas_cumprod, ours.scheduler.alphas_cumprod),
        "scale of the output": expected.abs().max().item(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(shapes()))
