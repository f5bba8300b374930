"""Preprocessing against the processors upstream uses, level by level."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from comfy_tdpo.rewards import pixels
from comfy_tdpo.rewards.pixels import CLIP_MEAN, CLIP_STD, pillow_pixels, torchvision_pixels

# height, width: as it is, up, down, tall, wide, an odd number to cut off, tiny, a large factor, long
SIZES = [(224, 224), (64, 64), (512, 512), (300, 200), (224, 400), (225, 338), (333, 226), (9, 17), (1000, 1300)]
SIZES += [(224, 3000), (3000, 100), (9, 2000), (2000, 9), (1, 300)]
BICUBIC = InterpolationMode.BICUBIC
# with its defaults, which are the configuration published with the model; version 5 moved it
PROCESSOR = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()


def picture(size: tuple[int, int]) -> Image.Image:
    """Noise, where resizing has most to do."""
    return Image.fromarray(np.random.RandomState(sum(size)).randint(0, 256, (*size, 3)).astype(np.uint8))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_openais_clip_and_imagereward_do(size):
    """They resize 8-bit images by Pillow through torchvision: the same levels, so the same numbers to rounding."""
    image = picture(size)
    theirs = Compose([Resize(224, BICUBIC), CenterCrop(224), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])(image)
    torch.testing.assert_close(pillow_pixels(tensor(image), 224)[0], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_the_processor_of_pickscore_does(size):
    """transformers' with Pillow, which cuts out another middle."""
    image = picture(size)
    theirs = torch.as_tensor(np.array(PROCESSOR(images=image, return_tensors="np").pixel_values[0]))
    torch.testing.assert_close(pillow_pixels(tensor(image), 224, crop="first")[0], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_hpsv2_does(size):
    """It resizes float tensors by torchvision, and keeps what overshoots."""
    image = picture(size)
    theirs = Compose([ToTensor(), Resize(224, BICUBIC), CenterCrop(224), Normalize(CLIP_MEAN, CLIP_STD)])(image)
    ours = torchvision_pixels(tensor(image), 224)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    if size == (64, 64):
        assert ours.max() > ((1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).max()


def test_without_antialiasing_it_would_not_agree():
    """What the tests above can tell apart."""
    image = picture((512, 512))
    blunt = torch.nn.functional.interpolate(tensor(image), (224, 224), mode="bicubic")[0]
    right = pillow_pixels(tensor(image), 224)[0] * torch.tensor(CLIP_STD)[:, None, None]
    right += torch.tensor(CLIP_MEAN)[:, None, None]
    assert (blunt - right).abs().max() > 0.2


def test_images_between_levels_are_taken_as_a_file_would_keep_them():
    image = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    kept = (image.clamp(0, 1) * 255).round() / 255
    assert torch.equal(pillow_pixels(image, 32), pillow_pixels(kept, 32))
    assert torch.equal(torchvision_pixels(image, 32), torchvision_pixels(kept, 32))
    assert pillow_pixels(image.bfloat16(), 32).dtype == torch.float32


LONG = [(20000, 800), (100, 8000), (1000, 30000), (10, 20000), (20000, 10)]


@pytest.mark.parametrize("size", LONG, ids=str)
@pytest.mark.parametrize("preprocess", [pillow_pixels, torchvision_pixels])
def test_a_long_image_takes_little_memory(preprocess, size):
    """It is stretched to as many as 448,000 pixels, of which 224 are kept."""
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with at_most_another(2**30):
        assert preprocess(image, 224).shape == (1, 3, 224, 224)


@contextmanager
def at_most_another(size: int) -> Iterator[None]:
    """Inside the block, more memory than that cannot be had: RuntimeError or MemoryError."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("size", SIZES[:10], ids=str)
def test_the_deterministic_form_is_the_same_resizing(size):
    """With its gradient, which the GPU's own form adds up in any order; float32 of levels to 255."""
    found = []
    for resize in (pixels._bicubic, pixels._bicubic_by_matrices):
        levels = (255 * tensor(picture(size))).requires_grad_()
        resized = resize(levels, 224, 200)
        (gradient,) = torch.autograd.grad(resized.square().sum(), levels)
        found.append((resized, gradient))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
