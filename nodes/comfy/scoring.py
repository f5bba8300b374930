"""Scores images with a reward: as numbers, as text, and as captions below the images.

Shapes: B images, H W pixels; ComfyUI's images are float (B, H, W, 3) in [0, 1], and some nodes add alpha as a fourth
channel.
"""

import statistics

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from comfy_tdpo.counts import number_of
from comfy_tdpo.interrupts import heeding
from comfy_tdpo.rewards import load_rewards, score_images
from comfy_tdpo.rewards.networks import needed

from ..runs.prompts import read_lines
from ..runs.reward_choice import RewardChoice

SCORED_AT_ONCE = 16
ROOM = 5 * 2**30  # bytes: the largest reward in float32, and its activations


def device_with_room() -> torch.device:
    """ComfyUI's device, after ComfyUI has made room for a reward there."""
    from comfy import model_management  # here, so that the rest can be tested without ComfyUI

    device = model_management.get_torch_device()
    model_management.free_memory(ROOM, device)
    return device


def prompt_of_each(text: str, images: int) -> list[str]:
    """The words of each image's prompt: those of the lines of `text`, or of its only line for all."""
    if not images:
        raise ValueError("got no images; expected at least one to score")
    lines = [words for words, _ in read_lines(text, "prompt")] or [""]
    if len(lines) not in (1, images):
        raise ValueError(
            f"got {number_of(len(lines), 'prompt')} for {number_of(images, 'image')}; expected one line for all, or "
            "one per image"
        )
    return lines * images if len(lines) == 1 else lines


def throw_if_cancelled() -> None:
    """Raise ComfyUI's exception if the user has cancelled the graph."""
    from comfy import model_management

    model_management.throw_exception_if_processing_interrupted()


def score(images: Tensor, prompts: list[str], reward: RewardChoice, device: torch.device) -> list[float]:
    """The score of each image.

    The model is loaded outside of inference mode: a training on another thread may share the instance, and could not
    use tensors that were made in inference mode.
    """
    with torch.inference_mode(False), torch.no_grad(), heeding(throw_if_cancelled):
        model = load_rewards(reward.weights, device, weights=reward.files)
        model.check_prompts(prompts)
        pixels = opaque(images).movedim(-1, 1)  # (B, 3, H, W)
        parts = zip(pixels.split(SCORED_AT_ONCE), _split(prompts), strict=True)
        with needed([model]):  # brought once, where a training does without it
            return [value for part, lines in parts for value in score_images(model, part.to(device), lines).tolist()]


def opaque(images: Tensor) -> Tensor:
    """A copy in float32 without alpha, (B, H, W, 3); transparent images are flattened on white, as image files are.

    Raises:
        ValueError: they have neither 3 nor 4 channels.
    """
    channels = images.shape[-1]
    if channels not in (3, 4):
        raise ValueError(
            f"got images of {channels} channels; expected 3 (red, green and blue), or 4 with alpha: convert them to RGB"
        )
    colours = images[..., :3].to(torch.float32, copy=True)
    if channels == 3:
        return colours
    alpha = images[..., 3:].float()
    return colours * alpha + (1 - alpha)


def pictures_of(images: Tensor | None) -> list[Tensor]:
    """ComfyUI's images one by one, (3, H, W) each; none if nothing is connected."""
    return [] if images is None else list(opaque(images).movedim(-1, 1))


def _split(prompts: list[str]) -> list[list[str]]:
    return [prompts[i : i + SCORED_AT_ONCE] for i in range(0, len(prompts), SCORED_AT_ONCE)]


def described(scores: list[float], reward: RewardChoice) -> str:
    spread = f" ± {statistics.stdev(scores):#.4g}" if len(scores) > 1 else ""
    lines = [f"{i}: {value:#.4g}" for i, value in enumerate(scores, 1)]
    return "\n".join([f"{reward.name}: {statistics.fmean(scores):#.4g}{spread}", *lines])


def captioned(images: Tensor, scores: list[float]) -> Tensor:
    """The images, (B, H + h, W, 3), each with its score on a white strip below."""
    height, width = images.shape[1:3]
    strip = max(12, width // 6)
    font = ImageFont.load_default(size=0.7 * strip)
    rows = []
    for pixels, value in zip((opaque(images).clamp(0, 1) * 255).round().byte().cpu().numpy(), scores, strict=True):
        canvas = Image.new("RGB", (width, height + strip), "white")
        canvas.paste(Image.fromarray(pixels))
        place = (width / 2, height + strip / 2)
        ImageDraw.Draw(canvas).text(place, f"{value:#.4g}", fill="black", font=font, anchor="mm")
        rows.append(torch.from_numpy(np.array(canvas)))
    return torch.stack(rows).float() / 255
