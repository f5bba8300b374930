"""The statistics of benchmarks/frontier.py, on curves and noise whose truth is known."""

import math
import random
import statistics

import pairs
import pytest
from benchmark_files import benchmark


@pytest.fixture(scope="module")
def frontier():
    return benchmark("frontier")


def curves(count: int) -> dict[str, list[float]]:
    """A reward that gains d and a gold score that loses as Gao et al.'s d (alpha - beta log d), at d = 0, 0.1, ..."""
    d = [0.1 * i for i in range(count)]
    gold = [0.7 + x * (0.2 - 0.3 * math.log(x)) if x else 0.7 for x in d]
    return {
        "reward": [5 + 2 * x for x in d],
        "std": [2.0] * count,
        "gold": gold,
        "queries": [96.0 * i for i in range(count)],
    }


def test_a_curve_is_read_where_the_training_reward_reaches_a_level(frontier, monkeypatch):
    monkeypatch.setattr(pairs, "SMOOTHING", 1)
    epochs = curves(30)
    gained, lost = frontier.gains(epochs), frontier.lost(epochs, "gold")
    assert gained == pytest.approx([0.1 * i for i in range(30)])
    expected = -2.05 * (0.2 - 0.3 * math.log(2.05))
    assert frontier.at(2.05, gained, lost) == pytest.approx(expected, abs=5e-4)  # on a line between two points
    assert frontier.at(2.05, gained, epochs["queries"]) == pytest.approx(96 * 20.5)
    assert frontier.at(3.1, gained, lost) is None


def test_it_is_the_first_time(frontier):
    assert frontier.at(1.0, [0.0, 2.0, 0.5, 2.0], [10.0, 20.0, 30.0, 40.0]) == 15.0
    assert frontier.at(0.0, [0.0, 1.0], [3.0, 4.0]) == 3.0


def test_epochs_are_smoothed_backwards():
    assert pairs.smooth([1.0, 2.0, 6.0, 1.0]) == [1.0, 1.5, 3.0, 3.0]


def test_the_intervals_of_one_method_against_itself_miss_zero_in_5_percent(frontier):
    draw = random.Random(0)
    missed = 0
    for _ in range(4000):
        middle, half = frontier.interval([draw.gauss(0, 1) for _ in range(5)])
        missed += abs(middle) > half
    assert missed / 4000 == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 4000) ** 0.5)  # five standard errors


def noisy(draw: random.Random, gain: float) -> dict[str, list[float]]:
    """A run of 15 epochs that gains about this much, in standard deviations, with the noise of 96 images an epoch; what
    it loses of the gold score depends on its gain alone."""
    gain *= math.exp(draw.gauss(0, 0.2))
    d = [gain * i / 14 for i in range(15)]
    return {
        "reward": [5 + 2 * (x + draw.gauss(0, 0.1)) for x in d],
        "std": [2.0] * 15,
        "shapes-gold": [0.7 - 0.1 * x**1.5 + draw.gauss(0, 0.02) for x in d],
    }


@pytest.mark.parametrize(("gains", "limit"), [((1.2, 1.2), 0.06), ((2.0, 1.0), 0.09)])
def test_runs_that_never_reach_the_level_hardly_change_that(frontier, gains, limit):
    """Two methods that lose the same for the same gain, as fast as each other or one twice as fast.

    Of these draws, which are always the same, 4.7 % and 7.5 % of the intervals miss 0. The second is more than 5 %,
    because a slow run has more epochs in which noise alone may take it to the level. If runs that never reach it
    counted with what they lose at their end, it would be 25 %.
    """
    draw, seeds, found = random.Random(0), range(12), []
    for _ in range(600):
        runs = {
            name: {seed: noisy(draw, gain) for seed in seeds} for name, gain in zip(("kl", "tdpo"), gains, strict=True)
        }
        found.append(frontier.kept_more(runs, "kl", "tdpo", frontier.GOLD))
    assert 0.2 < sum(map(len, found)) / (len(seeds) * 600) < 0.7, "seeds on which both get there"
    intervals = [frontier.interval(more) for more in found if len(more) > 1]
    assert len(intervals) > 500
    assert sum(abs(middle) > half for middle, half in intervals) / len(intervals) < limit


def test_runs_are_compared_seed_by_seed(frontier):
    """What a seed does to both runs alike is no difference between them."""
    base, offsets = curves(30), {1: 0.0, 2: 0.3, 3: -0.2}

    def shifted(by: float, less: float) -> dict[str, list[float]]:
        return base | {frontier.GOLD: [value + by - less * i for i, value in enumerate(base["gold"])]}

    runs = {
        "kl": {seed: shifted(by, 0.01) for seed, by in offsets.items()},
        "ddpo-100": {seed: shifted(by, 0.02) for seed, by in offsets.items()},
    }
    differences = frontier.kept_more(runs, "kl", "ddpo-100", frontier.GOLD)
    assert len(differences) == 3
    assert statistics.pstdev(differences) == pytest.approx(0, abs=1e-9)
    # a gain of 1 is reached after 11 epochs, as a mean of the last three
    assert differences[0] == pytest.approx(0.01 * 10, abs=0.01)


def test_what_the_page_says_it_means(frontier):
    base = curves(30)
    steps = {"recipe": 0.0, "ddpo-100": 0.01, "ddpo-2": 0.02}
    runs = {
        name: {
            seed: base | {frontier.GOLD: [value - less * i for i, value in enumerate(base["gold"])]} for seed in (1, 2)
        }
        for name, less in steps.items()
    }
    said, _, _, _, missing, _ = frontier.meaning(runs)
    for level in (0.75, 1.0):
        lost = [statistics.fmean(frontier.at_level(runs, name, frontier.GOLD, level).values()) for name in steps]
        more = f"{lost[1] - lost[0]:+.3f} ± 0.000 at a gain of {level:+.2f}"
        assert f"{more}, which both reach on 2 seeds" in said
    assert lost[1] > lost[0]
    assert "tdpo (0)" in missing and "recipe (2)" in missing
    assert frontier.meaning({"recipe": runs["recipe"]}) == []


def test_the_page_says_which_changes_help_which_harm_and_which_show_nothing(frontier):
    base = curves(30)

    def runs_losing(*by_seed: float) -> dict[int, dict[str, list[float]]]:
        return {
            seed: base | {frontier.GOLD: [value - less * i for i, value in enumerate(base["gold"])]}
            for seed, less in enumerate(by_seed)
        }

    runs = {
        "tdpo-r": runs_losing(0.02, 0.02, 0.02, 0.02),
        "kl": runs_losing(0.01, 0.011, 0.009, 0.01),
        "window": runs_losing(0.03, 0.031, 0.029, 0.03),
        "cosine": runs_losing(0.01, 0.03, 0.01, 0.03),
        "guard": runs_losing(0.0, 0.0, 0.0),  # one seed too few
    }
    said, _ = frontier.said_of_changes(runs)
    assert "Of 3 changes" in said
    assert "keep more gold than what they change: kl. These keep less: window." in said
    assert "the interval holds 0: cosine." in said


def test_settings_at_their_defaults_do_not_make_another_run():
    from comfy_tdpo.trainer.config import make_config

    mark = pairs.fingerprint(make_config("shapes"))
    assert mark == pairs.fingerprint(make_config("shapes", overrides={"eval_rewards": ["shapes-gold"]}))
    assert mark != pairs.fingerprint(make_config("shapes", overrides={"kl": {"coefficient": 0.1}}))
    assert mark != pairs.fingerprint(make_config("shapes", overrides={"seed": 1}))


def test_lines_of_todays_settings_count_and_others_do_not(frontier):
    """Of the results that lie beside the benchmark, too."""
    config = frontier.config_of("tdpo", 1)
    line = {"variant": "tdpo", "seed": 1, "settings": pairs.fingerprint(config), "epochs": {"reward": [1.0]}}
    others = [line | {"settings": "0"}, line | {"variant": "gone"}, line | {"seed": 2}]
    found = pairs.by_variant([line, *others], frontier.VARIANTS, frontier.config_of)
    assert found == {"tdpo": {1: {"reward": [1.0]}}}
    kept = pairs.results(frontier.HERE / "frontier.jsonl")
    named = [line for line in kept if line["variant"] in frontier.VARIANTS]
    assert sum(map(len, pairs.by_variant(kept, frontier.VARIANTS, frontier.config_of).values())) == len(named)


def test_the_recipe_is_shown_seed_by_seed_with_the_means_of_the_seeds_it_was_not_chosen_on(frontier):
    base = curves(30)
    base |= {frontier.JUDGE: base["gold"], frontier.GOLD: base["gold"]}
    runs = {
        name: {
            seed: base | {frontier.GOLD: [value - seed / 10 * (i > 0) for i, value in enumerate(base["gold"])]}
            for seed in range(1, seeds + 1)
        }
        for name, seeds in {"recipe": 7, "ddpo-100": 6}.items()
    }
    table = frontier.seed_by_seed(runs)
    assert table[2] == "| seed | recipe | ddpo-100 |" and len(table) == 2 + 2 + 7 + 2 + 1
    lost = frontier.lost(base, frontier.GOLD)[-1]
    fresh = table[-2]
    assert fresh.startswith("| mean of 6 to 7, fresh | ")
    assert f", {lost + 0.65:.3f}, " in fresh.split(" | ")[1] and f", {lost + 0.6:.3f}, " in fresh.split(" | ")[2]
    del runs["recipe"][6], runs["recipe"][7]
    assert frontier.seed_by_seed(runs) == []
