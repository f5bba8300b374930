"""How often a rule of `recommend` errs: `python benchmarks/recommend_rule.py`.

Simulates searches over the snapshots of a run, at three strengths each, on prompts drawn at random, and applies the
rule of trainer/recommend/choice.py at several confidences, with and without the closer look at the nearest cells, and
the rule that took the means for certain. What the training reward gains is known nearly exactly; the held-out reward
falls with the square of how far a cell has moved, by a given number of the base's standard deviations at the last cell.

Worlds: in `growing`, as in the tables of finished runs on Shapes, an image's change and a prompt's vary more the more a
cell changes; in `constant`, every cell has the same errors, an image's change varies by 0.65 and a prompt's by 0.15.

Prints, for each rule: the share of searches that recommend nothing; of the others, the share whose choice truly falls
by more than the tolerance, over all prompts; how far the chosen cell has moved, as a share of the furthest; and by how
much what is reported of its held-out reward is too high, from the noise that chose it, and from fresh noise.
"""

import argparse
import math
import platform
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.special import stdtrit

from comfy_tdpo.trainer.recommend.choice import NEAREST, Outcome, choose, judge, outcome_of
from comfy_tdpo.trainer.recommend.files import BASE, Cell, Draw
from comfy_tdpo.trainer.recommend.options import STRENGTHS, TOLERANCE
from comfy_tdpo.trainer.recommend.work import CLOSER

EPOCHS = 5  # snapshots
CORRELATION = 0.6  # of the changes of two cells, of the same image or prompt
MOVED = np.array([s * math.sqrt(e / EPOCHS) for e in range(1, EPOCHS + 1) for s in STRENGTHS])  # cells, (C,)
CELLS = [Cell(e, s, Path(f"{e}"), f"{e}") for e in range(1, EPOCHS + 1) for s in STRENGTHS]


class World:
    """One run: its true changes, (C,), and scores of images on demand, P prompts with any number of images each."""

    def __init__(self, rng: np.random.Generator, kind: str, fall: float, prompts: int):
        self.rng, self.change = rng, -fall * MOVED**2
        self.by_image = np.full_like(MOVED, 0.65)
        by_prompt = np.full_like(MOVED, 0.15)
        if kind == "growing":
            self.by_image = np.minimum(1, 2 * MOVED) * np.sqrt(0.04 + 0.16 * MOVED**2 - 2 * self.change)
            by_prompt = 0.03 * MOVED - 1.3 * self.change
        self.of_prompt = by_prompt[:, None] * self._correlated(prompts)
        self.base_of_prompt = math.sqrt(0.5) * rng.standard_normal(prompts)

    def _correlated(self, *shape: int) -> np.ndarray:
        common, own = self.rng.standard_normal((1, *shape)), self.rng.standard_normal((len(MOVED), *shape))
        return math.sqrt(CORRELATION) * common + math.sqrt(1 - CORRELATION) * own

    def draw(self, images: int, first: int) -> dict[Cell, dict[Draw, tuple[float, float]]]:
        prompts = len(self.base_of_prompt)
        base = self.base_of_prompt[:, None] + math.sqrt(0.5) * self.rng.standard_normal((prompts, images))
        noise = self.by_image[:, None, None] * self._correlated(prompts, images)
        held_out = base + self.change[:, None, None] + self.of_prompt[:, :, None] + noise
        draws = [(p, i, Draw(str(p), first + i)) for p in range(prompts) for i in range(images)]
        scores = {BASE: {draw: (0.0, base[p, i]) for p, i, draw in draws}}
        for cell, moved, own in zip(CELLS, MOVED, held_out, strict=True):
            scores[cell] = {draw: (moved, own[p, i]) for p, i, draw in draws}
        return scores


def search(world: World, images: int, rules: dict[str, "Rule"]) -> dict[str, tuple[float, ...] | None]:
    """What each rule recommends: whether it falls too much, how far it moved, and how wrong its reports are."""
    scores, fresh = world.draw(images, 0), world.draw(images, 10**6)
    more = world.draw((CLOSER - 1) * images, images)
    closer = {cell: own | more[cell] for cell, own in scores.items()}
    prompts = len(world.base_of_prompt)
    found, found_closer = (judge(("a", "b"), drawn, TOLERANCE, "") for drawn in (scores, closer))
    results: dict[str, tuple[float, ...] | None] = {}
    for name, rule in rules.items():
        first = [rule.outcome(outcome, prompts) for outcome in found.outcomes]
        chosen = choose(first, found.allowed)
        if chosen is None and rule.looks_closer:
            near = {o.cell for o in sorted(first, key=lambda outcome: -outcome.least)[:NEAREST]}
            second = [rule.outcome(o, prompts) for o in found_closer.outcomes if o.cell in near]
            chosen = choose(second, found_closer.allowed)
        results[name] = None
        if chosen is not None:
            at = CELLS.index(chosen.cell)
            here = world.change[at] + world.of_prompt[at].mean()  # of these prompts
            again = outcome_of(chosen.cell, fresh[chosen.cell], fresh[BASE]).change
            fell = world.change[at] < -TOLERANCE
            results[name] = (float(fell), MOVED[at], chosen.change - here, again - here)
    return results


class Rule:
    """The rule at a confidence; None takes the means for certain."""

    def __init__(self, confidence: float | None, looks_closer: bool = True):
        self.confidence, self.looks_closer = confidence, looks_closer

    def outcome(self, outcome: Outcome, prompts: int) -> Outcome:
        errors = float(stdtrit(prompts - 1, self.confidence)) if self.confidence else 0.0
        return replace(outcome, least=outcome.change - errors * outcome.error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--searches", type=int, default=300, help="in each world")
    searches = parser.parse_args().searches
    rules = {"means": Rule(None, False)}
    for confidence in (0.8, 0.9, 0.95):
        rules |= {f"{confidence:.0%}": Rule(confidence, False), f"{confidence:.0%}, closer": Rule(confidence)}
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}\n")
    print("| world, fall | prompts | rule | none | fell too much | moved | reported too high: then | fresh |")
    print("|---" * 8 + "|", flush=True)
    for kind, fall, prompts in (
        ("growing", 0.2, 8), ("growing", 0.4, 8), ("growing", 0.8, 8), ("growing", 0.4, 24), ("constant", 0.4, 8),
    ):  # fmt: skip
        rng = np.random.default_rng(0)
        found = [search(World(rng, kind, fall, prompts), 88 // prompts, rules) for _ in range(searches)]
        for name in rules:
            print(row(f"{kind}, {fall:g}", prompts, name, [results[name] for results in found]), flush=True)


def row(world: str, prompts: int, name: str, results: list[tuple[float, ...] | None]) -> str:
    some = [result for result in results if result is not None]

    def mean(i: int) -> float:
        return fmean(result[i] for result in some) if some else math.nan

    none = 1 - len(some) / len(results)
    cells = [world, str(prompts), name, f"{none:.2f}", f"{mean(0):.2f}", f"{mean(1):.2f}"]
    return "| " + " | ".join([*cells, f"{mean(2):+.3f}", f"{mean(3):+.3f}"]) + " |"


if __name__ == "__main__":
    main()
