"""Captioned pictures of Shapes, and the preference that a reward learns from them."""

import random

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .scenes import Scene, render, sample_request, sample_scene


def make_scenes(seed: int, count: int) -> tuple[list[str], list[Scene], Tensor]:
    """`count` captions, their scenes, and the rendered images, uint8 (count, 3, 64, 64)."""
    rng = random.Random(seed)
    requests = [sample_request(rng) for _ in range(count)]
    scenes = [sample_scene(request, rng) for request in requests]
    pixels = np.stack([render(scene) for scene in tqdm(scenes, desc="scenes", leave=False)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return [request.caption for request in requests], scenes, images


def preference(scene: Scene) -> float:
    """The preference that `shapes-aesthetic` learns, 0 to 10: large shapes on a dark background."""
    side = sum(figure.side for figure in scene.figures) / len(scene.figures)
    red, green, blue = scene.ground
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 5 * min(side / 48, 1.0) + 5 * (1 - luminance)
