"""What keeps alignment honest, side by side: `python benchmarks/frontier.py`.

Trains every variant below on Shapes over paired seeds (the same prompts and noise), and compares what is left of
shapes-gold and shapes-judge *at equal training reward*, and the reward queries needed to reach it. Writes
frontier.jsonl (one line per run: the series of each epoch), frontier.md and frontier.png beside this file.

A run that frontier.jsonl holds already is not repeated, and a stopped one is resumed, so the work can be spread over
days: `--variants`, `--seeds` and `--jobs` choose what is done now, and the page shows what there is.
"""

import argparse
import statistics
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from pairs import (
    ENOUGH,
    LEVELS,
    SMOOTHING,
    Line,
    Runs,
    Series,
    at,
    by_variant,
    gains,
    lost,
    results,
    row,
    series,
    train_missing,
    when_and_where,
    with_interval,
)

from comfy_tdpo.trainer.alarm import alarm_of
from comfy_tdpo.trainer.config import TrainConfig, make_config
from comfy_tdpo.trainer.evaluation.numbers import CONFIDENCE, interval
from comfy_tdpo.trainer.run import RunFolder

HERE = Path(__file__).parent
REWARD, GOLD, JUDGE = "shapes-aesthetic", "shapes-gold", "shapes-judge"
WATCHED = [JUDGE, GOLD]
AT = 1.0  # the level at which the page compares with the baselines
WORTH = (0.75, 1.0)  # the levels at which it compares a change with what it changes; more seeds reach the first
COLUMNS = (("queries", ".0f"), (GOLD, ".3f"), (JUDGE, ".3f"))
RECIPE, WITH_CRITIC, BASELINE, SLOWEST = "recipe", "recipe, critic", "ddpo-100", "ddpo-2"
SEEDS = 5  # on these the recipe was chosen


@dataclass(frozen=True)
class Variant:
    """What is trained: an algorithm and the settings that differ from the preset's.

    of: the variant that this one changes in one thing, or "" for the baselines.
    """

    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    of: str = "tdpo-r"


SEEING = {"reads": "clean", "prompt": True, "step": True, "architecture": "standardised", "activation": "relu"}
SEEING |= {"history": 4, "weight_decay": 1e-2, "image_size": "none"}
SCORES = SEEING | {"scores": True, "gae_lambda": 0.7}
PAPER = {"algorithm": "tdpo-r"}
MATCH = {"guards": ["shapes-match"], "guard_penalty": 2.0, "overoptimisation": {"reward": "shapes-alignment"}}
ADAPTING = {"guard_penalty": 1.5, "guard_credit": True, "guard_images": 8, "guard_adaptation": 0.5, "guard_slack": 0.2}
GROUPS = {"samples_per_prompt": 4, "moments": {"baseline": "group"}}
KL_TARGET = {"coefficient": 0.03, "target": 50.0, "controller": "proportional-integral"}
KL_RESET = {"coefficient": 0.03, "reset_every": 4}


def seeing(**more: Any) -> dict[str, Any]:
    return PAPER | {"critic": SEEING} | more


def recipe(algorithm: str = "ddpo-g", **more: Any) -> dict[str, Any]:
    return {"algorithm": algorithm} | more


def guarded(**more: Any) -> dict[str, Any]:
    return PAPER | {"guards": ["shapes-alignment"]} | more


PANELS = {  # of the figure
    "Baselines": {
        "ddpo-2": Variant("no critic, one update for all steps", {"algorithm": "ddpo-2"}, of=""),
        "ddpo-100": Variant("no critic, one update per step", {"algorithm": "ddpo-100"}, of=""),
        "tdpo": Variant("TDPO-R without resets", {"algorithm": "tdpo"}),
        "tdpo-r": Variant("the paper's critic, its active neurons reset", PAPER, of=""),
    },
    "The recipe": {
        "recipe": Variant("a bundle: no critic, a guard both ways, cosine", recipe()),
        "recipe, no guard": Variant("without a guard", recipe(guards=[]), of="recipe"),
        "recipe, constant rate": Variant(
            "a constant learning rate", recipe(policy={"lr_schedule": "constant"}), of="recipe"
        ),
        "recipe, critic": Variant("with a critic that sees", recipe("tdpo-g"), of="recipe"),
        "recipe, critic, penalty 2": Variant(
            "a penalty of 2 instead of 1.5", recipe("tdpo-g", guard_penalty=2.0), of="recipe, critic"
        ),
        "recipe, critic, match": Variant(
            "shapes-match as the guard", recipe("tdpo-g", **MATCH), of="recipe, critic, penalty 2"
        ),
        "recipe, critic, match, window": Variant(
            "the last fifth of the steps not trained",
            recipe("tdpo-g", **MATCH, policy={"train_until": 0.8}),
            of="recipe, critic, match",
        ),
    },
    "The critic": {
        "seeing": Variant("a critic that sees", seeing()),
        "seeing, no reset": Variant("without resets", seeing(algorithm="tdpo"), of="seeing"),
        "seeing, dormant reset": Variant("dormant neurons reset", seeing(neurons={"reset": "dormant"}), of="seeing"),
        "seeing, all reset": Variant("all neurons reset", seeing(neurons={"reset": "all"}), of="seeing"),
        "gae": Variant("lambda 0.9", seeing(critic=SEEING | {"gae_lambda": 0.9}), of="seeing"),
        "scores": Variant("lambda 0.7 and the scores of each step", seeing(critic=SCORES), of="seeing"),
    },
    "The policy step": {
        "step-normalised": Variant("step-normalised ratio", PAPER | {"policy": {"objective": "step-normalised"}}),
        "trust-region": Variant("trust-region mask", PAPER | {"policy": {"objective": "trust-region"}}),
        "groups": Variant("4 images a prompt, compared with each other", PAPER | GROUPS),
        "window": Variant("only the first half of the steps trained", PAPER | {"policy": {"train_until": 0.5}}),
        "share": Variant("half of the steps trained, drawn anew each epoch", PAPER | {"policy": {"train_share": 0.5}}),
        "no guidance": Variant("trained without guidance", PAPER | {"guidance": 1.0, "eval_guidance": 3.0}),
        "average": Variant("average of the LoRA, 0.9", PAPER | {"policy": {"ema": 0.9}}),
        "cosine": Variant("the learning rate falls by half a cosine", PAPER | {"policy": {"lr_schedule": "cosine"}}),
    },
    "The KL": {
        "kl": Variant("KL in the loss, 0.03 per nat", PAPER | {"kl": {"coefficient": 0.03}}),
        "kl target": Variant("held at 50 nats", PAPER | {"kl": KL_TARGET}, of="kl"),
        "kl by sigma": Variant(
            "KL in the loss, 0.1, weighted by sigma",
            PAPER | {"policy": {"objective": "step-normalised"}, "kl": {"coefficient": 0.1}},
            of="step-normalised",
        ),
        "kl reset": Variant("the reference reset every 4 epochs", PAPER | {"kl": KL_RESET}, of="kl"),
    },
    "Guards": {
        "guard": Variant("a guard's falls punished", guarded(guard_penalty=2.0)),
        "guard, both ways": Variant(
            "its rises rewarded, too", guarded(guard_penalty=2.0, guard_credit=True), of="guard"
        ),
        "guard, adapting": Variant("and a weight for each prompt", guarded(**ADAPTING), of="guard, both ways"),
        "gate": Variant("gated as in GARDO", guarded(guard_penalty=0.0, kl={"coefficient": 0.03, "gate": True}), "kl"),
        "diversity": Variant("advantages that favour diversity", PAPER | GROUPS | {"favour_diversity": True}, "groups"),
    },
}
VARIANTS = {name: variant for panel in PANELS.values() for name, variant in panel.items()}


# --- runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 1 to this for every variant")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), metavar="NAME", help="what to train now")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "frontier.jsonl", help="the results; .md and .png beside it")
    args = parser.parse_args()
    if unknown := sorted(set(args.variants) - VARIANTS.keys()):
        parser.error(f"got variant {unknown[0]!r}; expected some of {', '.join(VARIANTS)}")
    wanted = [(name, seed) for seed in range(1, args.seeds + 1) for name in args.variants]
    train_missing(wanted, config_of, epochs_of, args.runs, args.out, args.jobs)
    if not results(args.out):
        parser.error(f"got no results in {args.out} and no variants to train; expected either")
    write_page(args.out)


@cache
def config_of(name: str, seed: int) -> TrainConfig:
    return make_config("shapes", overrides=VARIANTS[name].settings | {"seed": seed, "eval_rewards": WATCHED})


def epochs_of(run: RunFolder) -> Series:
    """What the page needs of each epoch."""
    names = {"queries": "reward_queries", "reward": f"reward/{REWARD}/mean", "std": f"reward/{REWARD}/std"}
    names |= {name: f"eval/{name}/mean" for name in WATCHED}
    names |= {"explained": "critic/explained_variance", "explained_last": "critic/explained_variance_last"}
    names |= {"kl": "kl/nats", "diversity": "diversity", "seconds": "time/epoch_s"}
    metrics = run.metrics()
    alarm = alarm_of(metrics)
    return series(metrics, names) | {"alarm": [alarm.epoch] if alarm else []}


# --- curves and their comparison


def at_level(runs: Runs, name: str, of: str, level: float = AT) -> dict[int, float]:
    """By seed, what a variant has lost of `of`, or its "queries", where its training reward reaches `level`."""
    found = {}
    for seed, epochs in runs[name].items():
        values = epochs["queries"] if of == "queries" else lost(epochs, of)
        if (value := at(level, gains(epochs), values)) is not None:
            found[seed] = value
    return found


def kept_more(runs: Runs, name: str, than: str, of: str, level: float = AT) -> list[float]:
    """By common seed, how much more of `of` is left at equal training reward than with `than`."""
    ours, theirs = at_level(runs, name, of, level), at_level(runs, than, of, level)
    return [theirs[seed] - ours[seed] for seed in sorted(ours.keys() & theirs.keys())]


# --- the page


def write_page(out: Path) -> None:
    found = results(out)
    runs = by_variant(found, VARIANTS, config_of)
    draw(runs, out.with_suffix(".png"))
    out.with_suffix(".md").write_text(page(runs, found), encoding="utf-8")


def page(runs: Runs, found: list[Line]) -> str:
    lines = [
        "# What keeps alignment honest: shapes-gold left at equal training reward",
        "",
        "`python benchmarks/frontier.py`",
        "",
        f"{when_and_where(found)}. Preset `shapes`, training reward {REWARD}. Each variant "
        "but the recipe changes one thing; runs of one seed share prompts and noise. Curves are means of the last "
        f"{SMOOTHING} epochs. Gains are in standard deviations of the first epoch's rewards; what is lost is below the "
        f"first epoch's mean. Intervals hold {CONFIDENCE:.0%} (Student's t over seeds).",
        "",
        *meaning(runs),
        "![Gold lost over training reward gained](frontier.png)",
        "",
        *seed_by_seed(runs),
        "What each change is worth: how much more gold is left at equal training reward than with the variant that it "
        "changes, seed by seed. A seed counts where both runs reach the gain. Until the first reset, after epoch 10, a "
        "run with resets and one without are the same. An average of the LoRA is what is saved, and not what draws the "
        "images that are trained on, which are measured here.",
        "",
        *row("variant", "what is changed", "of", *(f"{level:+.2f}, seeds" for level in WORTH), head=True),
    ]
    for name, of in changes(runs):
        lines += row(name, VARIANTS[name].about, of, *(worth(runs, name, of, level) for level in WORTH))
    head = ["variant", "seeds that reach it", "reward queries", "gold lost", "judge lost"]
    lines += [
        "",
        f"At a gain of {AT:+.1f}. Where fewer seeds reach it, they are the ones that learned fastest, and means of "
        "different seeds cannot be compared:",
        "",
        *row(*head, f"more gold left than {BASELINE}", head=True),
    ]
    for name in runs:
        more = kept_more(runs, name, BASELINE, GOLD) if name != BASELINE and BASELINE in runs else []
        cells = [name, f"{len(at_level(runs, name, GOLD))} of {len(runs[name])}"]
        cells += [found_at(runs, name, of, AT, form) for of, form in COLUMNS]
        lines += row(*cells, with_interval(more))
    lines += ["", "Gold lost at each gain, with the number of seeds that reach it if not all do; and at the end:", ""]
    lines += row("variant", *(f"{level:+.2f}" for level in LEVELS), "end: gain", "gold lost", "judge lost", head=True)
    for name, seeds in runs.items():
        cells = [found_at(runs, name, GOLD, level, ".3f") for level in LEVELS]
        for form, curve in (("+.2f", gains), (".3f", partial(lost, name=GOLD)), (".3f", partial(lost, name=JUDGE))):
            cells.append(f"{statistics.fmean(curve(epochs)[-1] for epochs in seeds.values()):{form}}")
        lines += row(name, *cells)
    lines += [
        "",
        f"The alarm (docs/overoptimisation.md), and how much {GOLD} had been lost by then, or by the end:",
        "",
    ]
    head = ["variant", "seeds with an alarm", "gold lost at the alarm", "gold lost at the end without one"]
    lines += row(*head, head=True)
    for name, seeds in runs.items():
        if config_of(name, 1).overoptimisation.reward is None:
            continue  # its guard is the reward that would be watched
        rang = [lost(epochs, GOLD)[int(epochs["alarm"][0]) - 1] for epochs in seeds.values() if epochs["alarm"]]
        silent = [lost(epochs, GOLD)[-1] for epochs in seeds.values() if not epochs["alarm"]]
        cells = [", ".join(f"{value:.3f}" for value in sorted(part)) for part in (rang, silent)]
        lines += row(name, f"{len(rang)} of {len(seeds)}", *cells)
    lines += ["", "The critic, mean of epochs 3 to the last:", ""]
    lines += row("variant", "explained variance", "in the last third of the steps", head=True)
    for name, seeds in runs.items():
        if all("explained" in epochs for epochs in seeds.values()):
            both = [[statistics.fmean(e[key][2:]) for e in seeds.values()] for key in ("explained", "explained_last")]
            lines += row(name, *(f"{statistics.fmean(values):.2f}" for values in both))
    return "\n".join(lines) + "\n"


def changes(runs: Runs) -> list[tuple[str, str]]:
    """Each variant with the one that it changes, where both have been run."""
    return [(name, VARIANTS[name].of) for name in runs if VARIANTS[name].of in runs]


def worth(runs: Runs, name: str, of: str, level: float) -> str:
    more = kept_more(runs, name, of, GOLD, level)
    return f"{with_interval(more)}, {len(more)}"


def meaning(runs: Runs) -> list[str]:
    """What the figures mean, and what is missing; nothing until the recipe and its baselines have been run."""
    if not {RECIPE, BASELINE, SLOWEST} <= runs.keys():
        return []
    more = {level: kept_more(runs, RECIPE, BASELINE, GOLD, level) for level in WORTH}
    queries = [found_at(runs, name, "queries", WORTH[0], ".0f") for name in (RECIPE, BASELINE, SLOWEST)]
    missing = [f"{name} ({len(runs.get(name, {}))})" for name in VARIANTS if len(runs.get(name, {})) < SEEDS]
    return [
        f"How much more of {GOLD} the recipe has left than {BASELINE}, seed by seed: "
        + "; ".join(
            f"{with_interval(values)} at a gain of {level:+.2f}, which both reach on {len(values)} seeds"
            for level, values in more.items()
        )
        + f". To gain {WORTH[0]}, the recipe takes {queries[0]} reward queries, each scored by its guard too, "
        f"{BASELINE} {queries[1]} and {SLOWEST} {queries[2]}.",
        "",
        *said_of_changes(runs),
        *([f"Not run on {SEEDS} seeds yet: {'; '.join(missing)}.", ""] if missing else []),
    ]


def said_of_changes(runs: Runs, level: float = WORTH[0]) -> list[str]:
    """Which changes keep more gold at a gain, which less, and which make no difference that the seeds can show."""
    found: dict[str, list[str]] = {"more": [], "less": [], "neither": []}
    for name, of in changes(runs):
        more = kept_more(runs, name, of, GOLD, level)
        if len(more) >= ENOUGH and any(more):
            middle, half = interval(more)
            found["neither" if abs(middle) <= half else "more" if middle > 0 else "less"].append(name)
    names = {kind: "; ".join(found[kind]) or "none" for kind in found}
    count = sum(map(len, found.values()))
    return [
        f"Of {count} changes with {ENOUGH} seeds or more at a gain of {level:+.2f}, these keep more gold than what "
        f"they change: {names['more']}. These keep less: {names['less']}. For the others, the interval holds 0: "
        f"{names['neither']}. Of {count} intervals, {count * (1 - CONFIDENCE):.1f} would miss 0 by chance.",
        "",
    ]


def seed_by_seed(runs: Runs) -> list[str]:
    """How the recipe ends, with a critic and without, beside DDPO-100; nothing without a seed that is fresh to it."""
    names = [name for name in (RECIPE, WITH_CRITIC, BASELINE) if name in runs]
    seeds = sorted(runs.get(RECIPE, {}))
    parts = {f"1 to {SEEDS}": seeds[:SEEDS], f"{SEEDS + 1} to {seeds[-1]}, fresh": seeds[SEEDS:]} if seeds else {}
    if not all(parts.values()):
        return []
    curves = (gains, partial(lost, name=GOLD), partial(lost, name=JUDGE))

    def cell(name: str, seeds: list[int]) -> str:
        ends = [[curve(runs[name][seed])[-1] for seed in seeds if seed in runs[name]] for curve in curves]
        if not all(ends):
            return "-"
        gain, gold, judge = map(statistics.fmean, ends)
        return f"{gain:+.2f}, {gold:.3f}, {judge:.3f}"

    rows = [(str(seed), [seed]) for seed in seeds] + [(f"mean of {part}", some) for part, some in parts.items()]
    return [
        f"The recipe was chosen on seeds 1 to {SEEDS}; those from {SEEDS + 1} on are fresh to it. Reward gained, "
        "gold lost and judge lost at the end of each run:",
        "",
        *row("seed", *names, head=True),
        *(line for label, some in rows for line in row(label, *(cell(name, some) for name in names))),
        "",
    ]


def found_at(runs: Runs, name: str, of: str, level: float, form: str) -> str:
    """The mean of `at_level` over seeds as text, with the number of seeds if not all reach the level."""
    values = at_level(runs, name, of, level)
    if not values:
        return "-"
    count = "" if len(values) == len(runs[name]) else f" ({len(values)})"
    return f"{statistics.fmean(values.values()):{form}}{count}"


def draw(runs: Runs, path: Path) -> None:
    """Gold lost over gain, the mean over seeds at each level that all of them reach; the recipe and tdpo-r in each
    panel, in grey where they are not its own."""
    figure, panels = pyplot.subplots(2, 3, figsize=(15, 9), sharex=True, sharey=True, layout="constrained")
    for axes, (title, names) in zip(panels.flat, PANELS.items(), strict=True):
        for name, style in ((RECIPE, "-"), (PAPER["algorithm"], ":")):
            if name not in names and name in runs:
                axes.plot(*curve_of(runs, name), style, label=name, color="0.6")
        for index, name in enumerate(name for name in names if name in runs):
            axes.plot(*curve_of(runs, name), "o-", markersize=3, label=name, color=f"C{index}")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", fontsize="small")
    panels[0, 0].invert_yaxis()
    figure.supxlabel(f"{REWARD} gained, in standard deviations of the first epoch's rewards")
    figure.supylabel(f"{GOLD} lost")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curve_of(runs: Runs, name: str) -> tuple[list[float], list[float]]:
    """Levels of gain that all seeds reach, and the mean of what is lost there."""
    points = [(0.1 * i, at_level(runs, name, GOLD, 0.1 * i)) for i in range(20)]
    full = [(level, statistics.fmean(found.values())) for level, found in points if len(found) == len(runs[name])]
    return [level for level, _ in full], [value for _, value in full]


if __name__ == "__main__":
    main()
