"""Measures what a built world can do and writes the README in its folder."""

import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..models import load_model
from ..models.components import load_components
from ..models.stable_diffusion import Autoencoder
from ..models.tiny_decoder import load_tiny_decoder
from ..policy import DiffusionPolicy
from ..prompts import load_prompts
from ..rollout import Decoder, draw_images
from . import MODELS
from .dataset import make_scenes, preference
from .encoders import (
    load_clip_encoder,
    load_judge_encoder,
    load_match_encoder,
    load_preference_head,
    load_tokenizer,
    tokenize,
)
from .gold import diversity, fidelity, gold_scores

STEPS, GUIDANCE = 20, 3.0
IMAGES_PER_PROMPT = 4
FRESH_SCENES = 512  # rendered for the report, not used for training
DECODED_SCENES = 128  # of such, for the tiny decoder
NOISE_LEVELS = (-1, 249, 499, 749, 999)  # timesteps of the U-Net's schedule; -1 for none
GRID_COLUMNS = 9

COLUMNS = (
    ("model", "prompts", "shapes-gold", "all right", "shapes-aesthetic", "shapes-alignment", "shapes-judge")
    + ("shapes-match", "fidelity", "diversity")
)  # fmt: skip

PAGE = """# The world of Shapes

Built by `python -m comfy_tdpo.shapes.build` and measured on {date} ({machine}).
Everything here comes from random numbers and this program's own drawings; no outside data was used.

![Samples of the U-Net, one for each training prompt](samples.png)

## The base models

{per_prompt} images for each prompt of a set, {steps} steps, guidance {guidance:g}.

| {columns} |
|---|---|---|---|---|---|---|---|---|---|
{rows}

`shapes-gold` is the share of what the prompt asks for that a program finds in the image; "all right" is the share of
images for which it is 1. Fidelity is how much of an image flat shapes explain; diversity is the mean distance between
images of one prompt.

## The other parts, on {fresh} fresh scenes

| part | measure | value |
|---|---|---|
| shapes-gold | all right on clean renderings | {gold:.1%} |
| autoencoder | all right after encoding and decoding | {decoded:.1%} |
| shapes-aesthetic | correlation with the preference it learned | {correlation:.3f} |
| shapes-alignment (encoder A) | own caption ranked first among 16 | {clip:.1%} |
| shapes-judge (encoder B) | own caption ranked first among 16 | {judge:.1%} |
| shapes-match | own caption ranked first among 16 | {match:.1%} |

The captions of other scenes in a group of 16 are sometimes true of an image too: a reward that ranks all true captions
first, in random order, reaches 95 %.

The preference gives up to 5 points for size (the shapes' mean side divided by 48 pixels, at most 1) and up to 5 for a
dark background (1 minus its luminance). It was learned from ratings with a noise of one point.

## The tiny decoder, on {decoded_scenes} fresh scenes

It takes the place of the autoencoder's decoder in what a critic reads (`critic.decoder = "tiny"`), in a quarter of the
time. Its images beside those of the autoencoder, of latents with a share of noise in their variance: the mean
difference of a pixel, of 0 to 1; the cosine of the two images' embeddings by encoder A, the mean and the lowest; and
beside it, the mean cosine of two different scenes' images by the autoencoder.

| noise | difference | cosine | lowest | of two scenes |
|---|---|---|---|---|
{decoder}
"""


def write_report(world: Path) -> None:
    """Measure the world in the folder `world`, and write its README.md and samples.png."""
    rows, figures = [], _measure_parts(world)
    for model, place in MODELS.items():
        for name in ("shapes", "shapes-unseen", "shapes-complex"):
            prompts = load_prompts(name) * IMAGES_PER_PROMPT
            images = _draw(world / place.name, prompts)
            rows.append(f"| {model} | {name} | " + _figures(world, images, prompts))
            if model == name:
                _save_grid(images[: len(prompts) // IMAGES_PER_PROMPT], world / "samples.png")
    page = PAGE.format(
        date=date.today(),
        machine=f"{platform.system()}, {platform.machine()}, torch {torch.__version__}",
        per_prompt=IMAGES_PER_PROMPT,
        steps=STEPS,
        guidance=GUIDANCE,
        columns=" | ".join(COLUMNS),
        rows="\n".join(rows),
        fresh=FRESH_SCENES,
        decoded_scenes=DECODED_SCENES,
        decoder="\n".join(_measure_decoder(world)),
        **figures,
    )
    (world / "README.md").write_text(page, encoding="utf-8")


@torch.no_grad()
def _draw(folder: Path, prompts: list[str]) -> Tensor:
    model = load_model(str(folder), torch.float32)
    policy = DiffusionPolicy(model, steps=STEPS, guidance=GUIDANCE, resolution=64)
    return draw_images(Decoder(policy, batch=30), prompts, [("report", i) for i in range(len(prompts))], batch=30)


def _figures(world: Path, images: Tensor, prompts: list[str]) -> str:
    gold = gold_scores(images, prompts)
    pixels = images.permute(0, 2, 3, 1).numpy()
    clip, judge, match = load_clip_encoder(world), load_judge_encoder(world), load_match_encoder(world)
    embeds, tokens = clip.embed_images(images), tokenize(load_tokenizer(world), prompts)
    figures = (
        gold.mean(),
        (gold == 1).float().mean(),
        load_preference_head(world)(embeds).mean(),
        (embeds * clip.embed_tokens(tokens)).sum(-1).mean(),
        (judge.embed_images(images) * judge.embed_tokens(tokens)).sum(-1).mean(),
        (match.embed_images(images) * match.embed_tokens(tokens)).sum(-1).mean(),
        sum(fidelity(image) for image in pixels) / len(pixels),
        diversity(pixels, prompts),
    )
    return " | ".join(f"{float(figure):.2f}" for figure in figures) + " |"


@torch.no_grad()
def _measure_parts(world: Path) -> dict[str, float]:
    """Measure each part on its own, on scenes it was not trained on."""
    captions, scenes, pictures = make_scenes(seed=20_000_003, count=FRESH_SCENES)
    images, tokens = pictures.float() / 255, tokenize(load_tokenizer(world), captions)
    vae = load_components(str(world / "pipeline")).vae
    decoded = torch.cat([vae.decode(vae.encode(x * 2 - 1).latent_dist.mean).sample for x in images.split(64)])
    clip, judge, match = load_clip_encoder(world), load_judge_encoder(world), load_match_encoder(world)
    embeds = clip.embed_images(images)
    ratings = torch.stack([load_preference_head(world)(embeds), torch.tensor([preference(s) for s in scenes])])
    return {
        "gold": (gold_scores(images, captions) == 1).float().mean().item(),
        "decoded": (gold_scores((decoded / 2 + 0.5).clamp(0, 1), captions) == 1).float().mean().item(),
        "correlation": torch.corrcoef(ratings)[0, 1].item(),
        "clip": _first_of_16(embeds, clip.embed_tokens(tokens)),
        "judge": _first_of_16(judge.embed_images(images), judge.embed_tokens(tokens)),
        "match": _first_of_16(match.embed_images(images), match.embed_tokens(tokens)),
    }


@torch.no_grad()
def _measure_decoder(world: Path) -> Iterator[str]:
    """The rows of a table: the tiny decoder beside the autoencoder's, at each level of noise."""
    _, _, pictures = make_scenes(seed=20_000_003, count=DECODED_SCENES)
    parts, clip = load_components(str(world / "pipeline")), load_clip_encoder(world)
    full, tiny = Autoencoder(parts.vae), load_tiny_decoder(world / "decoder" / "model.safetensors")
    clean = parts.vae.encode(pictures.float() / 127.5 - 1).latent_dist.mean * parts.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for level in NOISE_LEVELS:
        latents, share = clean, 0.0
        if level >= 0:
            latents = parts.scheduler.add_noise(clean, noise, torch.full((len(clean),), level))
            share = 1 - parts.scheduler.alphas_cumprod[level].item()
        images = full(latents), tiny(latents)
        ours, theirs = map(clip.embed_images, images)
        cosines = F.cosine_similarity(ours, theirs)
        figures = (cosines.mean(), cosines.min(), F.cosine_similarity(ours, ours.roll(1, 0)).mean())
        difference = (images[0] - images[1]).abs().mean()
        yield f"| {share:.0%} | {difference:.3f} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |"


def _first_of_16(image_embeds: Tensor, text_embeds: Tensor) -> float:
    """How often an image's own caption is the closest of the captions in its group of 16."""
    groups = zip(image_embeds.split(16), text_embeds.split(16), strict=True)
    right = [((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean() for a, b in groups]
    return torch.stack(right).mean().item()


def _save_grid(images: Tensor, path: Path) -> None:
    count, _, height, width = images.shape
    rows = -(-count // GRID_COLUMNS)
    sheet = Image.new("RGB", (GRID_COLUMNS * (width + 2), rows * (height + 2)), "white")
    for i, image in enumerate(images):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        sheet.paste(Image.fromarray(pixels), (i % GRID_COLUMNS * (width + 2), i // GRID_COLUMNS * (height + 2)))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(path)
