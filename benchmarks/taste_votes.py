"""How many votes make a usable taste: `python benchmarks/taste_votes.py`.

Simulated artists vote on pictures that the base model of Shapes draws for its training prompts. What an artist truly
prefers is a function that the taste does not see; the taste reads pictures by encoder A. Three kinds of artist:

- visible: the share of the picture that the shapes cover, and how bright its ground is, measured on the pixels by a
  program; whether more or less of each is liked is drawn by the seed. Most prompts leave both open, so that a model can
  give the artist what the prompt allows;
- hidden: a random direction in the embedding space of encoder B, that of shapes-judge;
- both: the visible parts, and the hidden one at half their weight. Each part is in its standard deviation.

Votes are noisy. A picture is liked with the probability s(SHARPNESS u), and wins over another with
s(SHARPNESS (u - v)), where u and v are true preferences in standard deviations and s is the logistic function.

Measures Spearman's rank correlation of taste and true preference on fresh pictures of unseen prompts; `pairs right` is
the share of pairs of fresh pictures that the taste orders rightly, and `expected` is what it expects that to be. Then
trains on the taste of the artist `both` after 100 votes by the preset `shapes`, and measures the true preference.
"""

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.rewards import RewardModel, load_reward
from comfy_tdpo.rollout import Decoder, draw_images
from comfy_tdpo.tastes.folder import TasteFolder
from comfy_tdpo.tastes.head import Ballot, fit
from comfy_tdpo.tastes.votes import Thumb
from comfy_tdpo.trainer.assemble import assemble, load_policy
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.run import EpochMetrics, RunFolder
from comfy_tdpo.trainer.run.folder import spread

HERE = Path(__file__).parent
CPU = torch.device("cpu")
VOTED, FRESH = 400, 320  # pictures that artists vote on, and pictures to judge the taste by
VOTES = (10, 20, 50, 100, 200)
SEEDS = range(1, 21)
ARTISTS = {"visible": (1.0, 1.0, 0.0), "hidden": (0.0, 0.0, 1.0), "both": (1.0, 1.0, 0.5)}
KINDS = ("thumbs", "pairs")
SHARPNESS = 4.0
TRAINED, SEED = 100, 1  # votes and seed of the training
T_95 = 2.093  # Student's t with 19 degrees of freedom, for 95 % intervals of means over the seeds
LAST = 3  # epochs whose mean is the end of the run
TRUE = "true preference"
UNREACHABLE = (
    "An artist who goes by what the prompts fix, such as the colours of the shapes, gains much less: "
    "[the log](../docs/LOG.md) has such a run."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=Path("runs/taste-votes"), help="new folder of taste and run")
    parser.add_argument("--no-training", action="store_true", help="only measure how many votes a taste needs")
    parser.add_argument("--out", type=Path, default=HERE / "taste_votes.md")
    args = parser.parse_args()
    pictures = Pictures.drawn()
    true = {(artist, seed): Truth.of(Artist(artist, seed, pictures.voted), pictures) for artist, seed in artists()}
    rows = [(*cell, measure(pictures, true, *cell)) for cell in cells()]
    lines = [*head(" ".join(["python benchmarks/taste_votes.py", *sys.argv[1:]])), *table(rows)]
    if not args.no_training:
        lines += course(train(args.run, pictures))
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def artists() -> Iterator[tuple[str, int]]:
    return ((artist, seed) for artist in ARTISTS for seed in SEEDS)


def cells() -> Iterator[tuple[str, str, int]]:
    return ((artist, kind, votes) for artist in ARTISTS for kind in KINDS for votes in VOTES)


# --- pictures and artists ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Voted-on and fresh pictures, (N, 3, 64, 64), and their embeddings by encoder A, (N, 64) float64."""

    voted: Tensor
    fresh: Tensor
    voted_embeds: Tensor
    fresh_embeds: Tensor

    @classmethod
    @torch.no_grad()
    def drawn(cls) -> "Pictures":
        decoder = Decoder(load_policy(make_config("shapes"), CPU), 24)
        encoder = load_reward("shapes-aesthetic", CPU)
        found = []
        for source, count in (("shapes", VOTED), ("shapes-unseen", FRESH)):
            seeds: list[tuple[int | str, ...]] = [("taste votes", source, i) for i in range(count)]
            found.append(draw_images(decoder, spread(load_prompts(source), count), seeds, 24))
        return cls(*found, *(encoder.embed(pictures).double() for pictures in found))


class Artist:
    """What an artist truly prefers, in standard deviations over the pictures that artists vote on.

    A RewardModel, so that a training can measure it; nothing is trained on it.
    """

    name = TRUE
    embed_dim: int | None = None
    differentiable = False

    def __init__(self, kind: str, seed: int, reference: Tensor):
        generator = generator_at("artist", seed)
        self.signs = torch.randn(2, generator=generator).sign().double()
        self.direction = torch.randn(64, generator=generator).double()
        self.judge = load_reward("shapes-judge", CPU)
        parts = self._parts(reference)
        self.mean, self.weights = parts.mean(0), torch.tensor(ARTISTS[kind]).double() / parts.std(0)
        self.spread = ((parts - self.mean) @ self.weights).std()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return ((self._parts(images) - self.mean) @ self.weights / self.spread).float()

    @torch.no_grad()
    def _parts(self, images: Tensor) -> Tensor:
        """Coverage, brightness and the hidden part, (B, 3)."""
        visible = torch.stack([covered(images), brightness(images)], dim=1).double() * self.signs
        return torch.cat([visible, (self.judge.embed(images).double() @ self.direction)[:, None]], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError("an artist has no encoder")

    def check_prompts(self, prompts: list[str]) -> None:
        """Only pictures count."""


def ground(images: Tensor) -> Tensor:
    """The median of the border's pixels, (B, 3, 1, 1)."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=-1)
    return border.median(-1).values[..., None, None]


def covered(images: Tensor) -> Tensor:
    """The share of pixels that differ from the ground."""
    return ((images - ground(images)).abs().amax(1) > 0.2).float().mean((1, 2))


def brightness(images: Tensor) -> Tensor:
    return ground(images).mean((1, 2, 3))


# --- votes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """An artist's true preference for the pictures, float64 (N,)."""

    voted: Tensor
    fresh: Tensor

    @classmethod
    def of(cls, artist: Artist, pictures: Pictures) -> "Truth":
        return cls(artist.score(pictures.voted, []).double(), artist.score(pictures.fresh, []).double())


@dataclass(frozen=True)
class Found:
    """Of each seed: rank correlation, pairs right, and pairs expected right."""

    correlation: list[float]
    right: list[float]
    expected: list[float]


def measure(pictures: Pictures, truths: dict[tuple[str, int], Truth], artist: str, kind: str, votes: int) -> Found:
    found = Found([], [], [])
    for seed in SEEDS:
        true = truths[artist, seed].fresh
        taste = fit(ballot_of(pictures.voted_embeds, truths[artist, seed].voted, kind, votes, seed))
        scores = taste.log_odds(pictures.fresh_embeds).double()
        found.correlation.append(float(spearmanr(scores, true).statistic))
        a, b = torch.triu_indices(len(true), len(true), offset=1)
        found.right.append(((scores[a] - scores[b]) * (true[a] - true[b]) > 0).double().mean().item())
        found.expected.append(taste.sureness(pictures.fresh_embeds))
    return found


def ballot_of(embeds: Tensor, true: Tensor, kind: str, votes: int, seed: int) -> Ballot:
    """The artist's votes on pictures with these embeddings, (N, 64), and true preferences, (N,)."""
    first, second, luck = drawn_votes(seed, votes)
    none = embeds[:0]
    if kind == "thumbs":
        return Ballot(embeds[first], (luck < (SHARPNESS * true[first]).sigmoid()).double(), none, none)
    wins = luck < (SHARPNESS * (true[first] - true[second])).sigmoid()
    winner, loser = torch.where(wins, first, second), torch.where(wins, second, first)
    return Ballot(none, none[:, 0], embeds[winner], embeds[loser])


def drawn_votes(seed: int, votes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pictures of the votes, the second ones of pairs, and uniform numbers that decide noisy votes, (votes,)."""
    generator = generator_at("votes", seed)
    order, luck = torch.randperm(VOTED, generator=generator), torch.rand(VOTED, generator=generator).double()
    return order[:votes], order.flip(0)[:votes], luck[:votes]


# --- training ---------------------------------------------------------------------------------------------------------


def train(folder: Path, pictures: Pictures) -> list[EpochMetrics]:
    """The metrics of a run on the taste after TRAINED thumbs, with the true preference measured."""
    artist = Artist("both", SEED, pictures.voted)
    taste = TasteFolder.create(folder / "artist", "shapes-aesthetic")
    if not taste.votes():
        first, _, luck = drawn_votes(SEED, TRAINED)
        liked = luck < (SHARPNESS * artist.score(pictures.voted[first], []).double()).sigmoid()
        taste.append([Thumb(taste.keep(pictures.voted[i]), float(up)) for i, up in zip(first, liked, strict=True)])
    values = {"rewards": {"taste:artist": 1.0}, "reward_weights": {"taste:artist": str(taste.path)}, "seed": SEED}
    config = make_config("shapes", overrides=values)
    run = RunFolder(folder / "run")
    training = assemble(config, run)
    measured: dict[str, RewardModel] = training.context.eval_rewards
    measured[TRUE] = artist
    if not (run.path / "config.toml").exists():
        run.create(config)
    for metrics in training.epochs():
        print(f"epoch {metrics['epoch']}: {metrics[f'eval/{TRUE}/mean']:+.3f}", flush=True)
    return run.metrics()


# --- the page ---------------------------------------------------------------------------------------------------------


def head(command: str) -> list[str]:
    return [
        "# Votes that make a taste",
        "",
        f"`{command}`",
        "",
        f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}. Rank correlation (Spearman) of the taste with the "
        f"true preference, on {FRESH} fresh pictures of prompts that were not voted on: mean over {len(SEEDS)} seeds "
        "with the 95 % interval of the mean, and the lowest. Every seed is another artist with other votes. The "
        "benchmark's docstring says what the artists prefer and how noisy their votes are.",
        "",
        "| artist | votes | kind | rank correlation | lowest | pairs right | expected |",
        "|---|---|---|---|---|---|---|",
    ]


def table(rows: list[tuple[str, str, int, Found]]) -> list[str]:
    return [
        f"| {artist} | {votes} | {kind} | {spread_of(found.correlation)} | {min(found.correlation):.2f} | "
        f"{statistics.fmean(found.right):.2f} | {statistics.fmean(found.expected):.2f} |"
        for artist, kind, votes, found in rows
    ]


def spread_of(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {T_95 * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def course(metrics: list[EpochMetrics]) -> list[str]:
    names = {"reward/taste:artist": "the taste, trained on", f"eval/{TRUE}": TRUE}
    roles = {"eval": "held out", "guard": "the guard"}
    for role, name in (key.split("/")[:2] for key in metrics[0] if key.endswith("/mean")):
        if role in roles and name != TRUE:
            names[f"{role}/{name}"] = f"{name}, {roles[role]}"
    lines = [
        "",
        f"A training on the taste of the artist `both` of seed {SEED} after {TRAINED} thumbs: preset `shapes`, "
        f"{len(metrics)} epochs, seed {SEED}. First epoch, mean of the last {LAST}, and the change in standard "
        "deviations of the first epoch.",
        "",
        f"| reward | epoch 1 | last {LAST} | change |",
        "|---|---|---|---|",
    ]
    for key, name in names.items():
        means = [line[f"{key}/mean"] for line in metrics]
        end = statistics.fmean(means[-LAST:])
        lines.append(f"| {name} | {means[0]:.3f} | {end:.3f} | {(end - means[0]) / metrics[0][f'{key}/std']:+.2f} |")
    return [*lines, "", UNREACHABLE]


if __name__ == "__main__":
    main()
