"""benchmarks/paper.py: its rule, what its figures need, and its page, on results whose truth is known."""

import dataclasses
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import frontier
import pairs
import paper
import pytest
from paper import FIGURES, Claim, Work, needs, verdict, world_of

from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.plots.evaluation import _look_of

SHAPES = world_of("shapes", {})
MAIN = "tdpo-r", "tdpo"


@pytest.fixture
def work(tmp_path) -> Work:
    return Work(SHAPES, seeds=5, jobs=2, runs=tmp_path / "runs", out=tmp_path / "paper.jsonl")


@pytest.fixture(autouse=True)
def without_frontier(monkeypatch, tmp_path):
    monkeypatch.setattr(paper, "HERE", tmp_path)


def finished(loss: float, gain: float = 1.5, noise: random.Random | None = None) -> pairs.Series:
    """A run of 15 epochs that loses `loss` of all other rewards for each standard deviation that it gains."""
    wobble = noise or random.Random(0)
    gained = [gain * i / 14 for i in range(15)]
    names = [name for name in (*SHAPES.rewards, *SHAPES.judges, *SHAPES.truth) if name != SHAPES.rewards[0]]
    run: pairs.Series = {
        "queries": [96 * (i + 1) for i in range(15)],
        "reward": [5 + 2 * (x + (wobble.gauss(0, 0.1) if noise else 0)) for x in gained],
        "std": [2.0] * 15,
        "explained": [0.1] * 15,
        "seconds": [12.0] * 15,
    }
    for name in names:
        run[name] = [0.7 - loss * x + (wobble.gauss(0, 0.02) if noise else 0) for x in gained]
        run[f"{name} std"] = [0.5] * 15
    return run


def line(work: Work, key: str, seed: int, epochs: pairs.Series, **more: str) -> pairs.Line:
    what = {"variant": SHAPES.label(key), "seed": seed, "settings": work.marks[key, seed]}
    return what | more | {"date": "2026-11-26", "machine": "none", "epochs": epochs}


def write(path: Path, lines: list[pairs.Line]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")


# --- the rule


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1.0, 1.1, 0.9, 1.0], "confirmed"),
        ([-1.0, -1.1, -0.9, -1.0], "contradicted"),
        ([1.0, -1.0, 1.0, -0.5], "not seen"),
        ([0.0, 0.0, 0.0, 0.0], "not seen"),
        ([1.0, 1.0, 1.0], "undecided"),
        ([], "undecided"),
    ],
)
def test_the_interval_decides(values, found):
    assert verdict(values) == found


def test_the_interval_is_that_of_student():
    """Of 1 - a, 1 - a, 1 + a and 1 + a, its lower end, 1 - 3.182 a / sqrt(3), is at 0 for a = 0.544."""
    assert verdict([0.46, 0.46, 1.54, 1.54]) == "confirmed"
    assert verdict([0.45, 0.45, 1.55, 1.55]) == "not seen"


@pytest.mark.parametrize("prompts", ["", "set"])
@pytest.mark.parametrize("gains", [(1.2, 1.2), (2.0, 1.0)])
def test_equal_methods_seldom_differ(gains, prompts):
    """Two methods that lose as much for the same gain, as fast as each other or one twice as fast.

    The noise is that of 96 images an epoch; a snapshot comes every third epoch. Of these draws, which are always the
    same, 6.3 % and 5.5 % of the intervals miss 0, and with snapshots 4.8 % and 4.5 %; the limit is three standard
    errors above 5 %.
    """
    draw, decided = random.Random(0), []
    claim = Claim("tdpo-r", "tdpo", "gold", "")
    for _ in range(400):
        there = {
            (name, prompts): {seed: finished(0.1, gain * math.exp(draw.gauss(0, 0.2)), draw) for seed in range(5)}
            for name, gain in zip(MAIN, gains, strict=True)
        }
        if prompts:
            for runs in there.values():
                runs |= {
                    seed: {name: [*each[::3], each[-1]] for name, each in run.items()} for seed, run in runs.items()
                }
        decided.append(verdict(paper.differences(SHAPES, there, claim, prompts)))
    assert decided.count("undecided") < 20
    missed = (decided.count("confirmed") + decided.count("contradicted")) / len(decided)
    assert missed < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_what_is_left_is_compared_at_equal_training_reward():
    """One loses 0.1 and the other 0.2 for each standard deviation. The gains that both reach are 0.5 and 0.75, at which
    they are 0.0625 apart on average. Evaluations are not smoothed."""
    there = {("tdpo-r", "set"): {1: finished(0.1, 2.0)}, ("tdpo", "set"): {1: finished(0.2, 0.8)}}
    (gold,) = paper.differences(SHAPES, there, Claim(*MAIN, "gold", ""), "set")
    (others,) = paper.differences(SHAPES, there, Claim(*MAIN, "others", ""), "set")
    assert gold == pytest.approx(0.0625)
    assert others == pytest.approx(0.0625 / 0.5)  # in standard deviations


def test_nothing_is_said_of_a_run_before_its_first_snapshot():
    """Both lose nothing up to a gain of 1 and then alike, but the first snapshot of one comes at 1.2 already."""
    slow, fast = [0.0, 0.4, 0.8, 1.0, 1.2, 1.6, 2.0], [0.0, 1.2, 1.6, 2.0]
    runs = {
        name: {1: {"reward": gained, "std": [1.0], "shapes-gold": [0.7 - 0.2 * max(0, x - 1) for x in gained]}}
        for name, gained in (("tdpo-r", fast), ("tdpo", slow))
    }
    there = {(name, "set"): seeds for name, seeds in runs.items()}
    assert paper.differences(SHAPES, there, Claim(*MAIN, "gold", ""), "set") == [pytest.approx(0)]


def test_fewer_queries_are_a_positive_difference():
    there = {("tdpo-r", ""): {1: finished(0.1, 2.0)}, ("tdpo", ""): {1: finished(0.1, 1.0)}}
    assert paper.differences(SHAPES, there, Claim(*MAIN, "queries", ""), "")[0] > 0
    assert paper.differences(SHAPES, there, Claim(*MAIN, "gain", ""), "")[0] == pytest.approx(13 / 14)


def test_seeds_are_paired_and_one_without_the_other_does_not_count():
    there = {
        ("tdpo-r", ""): {seed: finished(0.1) for seed in (1, 2, 3)},
        ("tdpo", ""): {seed: finished(0.2) for seed in (2, 3, 4)},
    }
    assert len(paper.differences(SHAPES, there, Claim(*MAIN, "gold", ""), "")) == 2
    there["tdpo", ""][3] = finished(0.2, gain=0.4)  # reaches no level
    assert len(paper.differences(SHAPES, there, Claim(*MAIN, "gold", ""), "")) == 1


def test_a_run_that_lacks_what_is_compared_does_not_count():
    """As a line of frontier.py, which has no shapes-match."""
    few = {name: values for name, values in finished(0.1).items() if "match" not in name}
    there = {("tdpo-r", ""): {1: finished(0.1)}, ("tdpo", ""): {1: few}}
    assert paper.differences(SHAPES, there, Claim(*MAIN, "others", ""), "") == []
    assert paper.differences(SHAPES, there, Claim(*MAIN, "gold", ""), "") == [pytest.approx(0)]


def test_overlap_is_measured_against_sets_drawn_at_random():
    """Of 1,000 neurons, 40 % and then 30 % are dormant: sets at random overlap by 40 % of the smaller."""
    draw, overlaps = random.Random(0), []
    for _ in range(300):
        now, before = set(draw.sample(range(1000), 300)), set(draw.sample(range(1000), 400))
        overlaps.append(100 * len(now & before) / 300)
    for overlap in (sum(overlaps) / len(overlaps), 100.0):
        run = {"overlap": [None, overlap], "dormant": [40.0, 30.0]}
        (above,) = paper.differences(SHAPES, {("tdpo", ""): {1: run}}, Claim("tdpo", "", "overlap", ""), "")
        assert above == pytest.approx((overlap - 40) / 0.6)  # in percent of the 60 that there can be
    assert sum(overlaps) / len(overlaps) == pytest.approx(40, abs=0.5)  # three standard errors


def test_a_run_without_any_overlap_above_chance_does_not_count():
    runs = {
        1: {"overlap": [None, None], "dormant": [0.0, 0.0]},
        2: {"overlap": [None, 55.0], "dormant": [40.0, 30.0]},
        3: {"overlap": [None, 100.0], "dormant": [100.0, 100.0]},  # where nothing can be above chance
    }
    claim = Claim(*MAIN, "overlap", "")
    assert paper.differences(SHAPES, {("tdpo-r", ""): runs}, Claim("tdpo-r", "", "overlap", ""), "") == [25.0]
    assert paper.differences(SHAPES, {("tdpo-r", ""): runs, ("tdpo", ""): runs}, claim, "") == [0.0]


def test_a_held_out_reward_without_spread_has_no_unit():
    flat = finished(0.1) | {"shapes-judge std": [0.0] * 15}
    there = {("tdpo-r", ""): {1: flat, 2: finished(0.1)}, ("tdpo", ""): {1: finished(0.2), 2: finished(0.2)}}
    assert len(paper.differences(SHAPES, there, Claim(*MAIN, "others", ""), "")) == 1
    assert len(paper.differences(SHAPES, there, Claim(*MAIN, "gold", ""), "")) == 2


# --- what is needed


def test_every_figure_of_the_paper_is_there():
    assert [name for name in FIGURES if name.isdigit()] == [str(number) for number in range(2, 15)]


def test_figures_that_share_runs_train_them_once(work):
    both = work.missing(needs(SHAPES, [FIGURES["3"], FIGURES["7"]]), {})
    assert len(both) == len(set(both))
    assert {key for key, *_ in both} == {
        *("alignprop", "ddpo-100", "tdpo", "tdpo-r"),
        *("tdpo, dormant reset", "tdpo, all reset"),
    }
    assert len(both) == 6 * 5
    assert [seed for *_, seed in both[:7]] == [1, 1, 1, 1, 1, 1, 2]  # seed by seed


def test_all_variants_are_different_runs(work):
    assert len(set(work.marks.values())) == len(work.marks)
    every = work.missing(needs(SHAPES, FIGURES.values()), {})
    assert len(every) == len(set(every))


def test_evaluations_need_their_runs(work):
    of = needs(SHAPES, [FIGURES["12"]])
    assert of["tdpo/2", "shapes-complex"] >= {"reward", "std", "shapes-gold", "shapes-aesthetic std"}
    assert of["tdpo/2", ""] >= {"reward", "shapes-aesthetic std"}  # which no run of frontier.py has
    assert "shapes-match" not in of["tdpo/2", "shapes-complex"]  # it is trained on


def test_what_is_there_is_not_done_again(work):
    needed = needs(SHAPES, [FIGURES["6"]])
    todo = work.missing(needed, work.held())
    write(work.out, [line(work, "tdpo, kl", 2, finished(0.1))])
    assert set(todo) - set(work.missing(needed, work.held())) == {("tdpo, kl", "", 2)}


def test_evaluations_are_made_reward_by_reward_and_seed_by_seed(work, monkeypatch):
    """So that those of the first reward, which decide most, are there first."""
    made: list[tuple[int, set[str]]] = []
    monkeypatch.setattr(Work, "train", lambda self, key, seed, names: None)
    monkeypatch.setattr(Work, "evaluate", lambda self, seed, wanted: made.append((seed, {key for key, _ in wanted})))
    first = {"alignprop", "ddpo-100", "tdpo", "tdpo-r"}
    one_at_a_time = dataclasses.replace(work, jobs=1, seeds=2)
    one_at_a_time.do(needs(SHAPES, [FIGURES["11"], FIGURES["13"]]))
    assert made == [(seed, {key + on for key in first}) for on in ("", "/1", "/2") for seed in (1, 2)]


def test_a_run_that_is_repeated_adds_its_line_only_if_it_differs(work, monkeypatch):
    """As one whose folder was deleted before its snapshots were drawn; how long it takes does not count."""
    write(work.out, [line(work, "tdpo", 2, finished(0.1))])
    for loss, lines in ((0.1, 1), (0.2, 2)):
        again = finished(loss) | {"seconds": [20.0] * 15}
        monkeypatch.setattr(pairs, "train", lambda path, config: None)
        monkeypatch.setattr(paper, "trained_series", lambda world, run, key, again=again: again)
        work.train("tdpo", 2, {"reward"})
        assert len(pairs.results(work.out)) == lines
    assert work.held()["tdpo", ""][2]["shapes-gold"] == finished(0.2)["shapes-gold"]


def test_a_plan_counts_runs_that_are_trained_again_for_their_evaluations(work, monkeypatch):
    lines = [line(work, key, 1, finished(0.1)) for key in ("alignprop", "ddpo-100", "tdpo", "tdpo-r")]
    write(work.out, lines)
    once, needed = dataclasses.replace(work, seeds=1), needs(SHAPES, [FIGURES["13"]])
    assert "in all 4 runs, 5760 reward queries, 768 images" in once.plan(needed)
    monkeypatch.setattr(Work, "finished", lambda self, key, seed: key != "tdpo")
    assert "in all 1 runs, 1440 reward queries, 768 images" in once.plan(needed)


def test_a_run_that_was_killed_before_its_settings_were_written_is_planned_again(work):
    work.path("tdpo", 1).mkdir(parents=True)
    once = dataclasses.replace(work, seeds=1)
    assert "in all 4 runs" in once.plan(needs(SHAPES, [FIGURES["13"]]))


def test_the_runs_of_the_frontier_stand_in_if_they_have_what_is_needed(work, tmp_path):
    lines = []
    for variant, key in (("ddpo-2", "ddpo-2"), ("tdpo", "tdpo"), ("seeing, no reset", "tdpo, critic sees")):
        settings = frontier.VARIANTS[variant].settings | {"seed": 1, "eval_rewards": frontier.WATCHED}
        mark = pairs.fingerprint(make_config("shapes", overrides=settings))
        assert mark == work.marks[key, 1]
        few = {name: finished(0.1)[name] for name in ("queries", "reward", "std", "explained", "shapes-gold")}
        lines.append({"variant": variant, "seed": 1, "settings": mark, "epochs": few})
    write(tmp_path / "frontier.jsonl", lines)
    todo = work.missing(needs(SHAPES, FIGURES.values()), work.held())
    trained = [key for key, prompts, seed in todo if seed == 1 and not prompts]
    assert "ddpo-2" not in trained and "tdpo, critic sees" not in trained
    assert "tdpo" in trained  # other rewards judge it, too


def test_measuring_neurons_makes_no_other_run():
    plain, measured = (
        make_config("shapes", overrides={"algorithm": "tdpo", "neurons": {"policy_measure": on}})
        for on in (False, True)
    )
    assert pairs.fingerprint(plain) == pairs.fingerprint(measured)
    assert pairs.fingerprint(plain) != pairs.fingerprint(make_config("shapes", overrides={"algorithm": "tdpo-r"}))


def test_a_line_that_was_cut_off_is_removed(tmp_path):
    out = tmp_path / "results.jsonl"
    pairs.add(out, {"seed": 1}, {})
    with out.open("a") as file:
        file.write('{"seed": 2, "epo')
    assert [each["seed"] for each in pairs.results(out)] == [1]
    pairs.add(out, {"seed": 3}, {})
    assert [each["seed"] for each in pairs.results(out)] == [1, 3]


def test_results_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"seed": 1}\n{"seed" 2}\n')
    with pytest.raises(
        ValueError, match=r"results.jsonl is damaged \(line 2: Expecting .*\); remove the lines that are not JSON"
    ):
        pairs.results(tmp_path / "results.jsonl")


def test_resets_come_as_often_in_a_run_as_in_the_papers():
    shapes, sd14 = SHAPES.config("tdpo-r", 1), world_of("sd14-hpsv2", {}).config("tdpo-r", 1)
    assert (shapes.epochs, shapes.neurons.every) == (15, 2)
    assert (sd14.epochs, sd14.neurons.every) == (100, 10)
    assert SHAPES.config("tdpo", 1).neurons.reset == "none"


def test_the_other_encoder_is_that_of_another_reward():
    for key in ("tdpo-r, other encoder", "tdpo-r, other encoder/2"):
        assert SHAPES.config(key, 1).critic.encoder in {*SHAPES.rewards} - {SHAPES.reward(key)}


def test_a_preset_of_stable_diffusion_plans_the_real_run(tmp_path):
    def plan(seconds: float) -> str:
        work = Work(world_of("sd14-hpsv2", {}), 5, 1, tmp_path / "runs", tmp_path / "out.jsonl", seconds)
        return work.plan(needs(work.world, [FIGURES["6"]]))

    assert "in all 15 runs, 384000 reward queries" in plan(0)  # 3 variants x 5 seeds x 100 epochs x 256 samples
    assert "hours unknown for 3 variants" in plan(0) and "GiB of disk space" in plan(0)
    assert "416.7 hours with 1 at a time" in plan(1000)  # 1,500 epochs


# --- the command line


def run(monkeypatch, tmp_path, *arguments: str) -> None:
    files = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr("sys.argv", ["paper.py", *arguments, *files])
    paper.main()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--jobs 0", "--jobs: got '0'; expected a whole number of at least 1"),
        ("--seeds 0", "--seeds: got '0'; expected a whole number of at least 1"),
        ("--set epochs", "--set: got 'epochs'; expected a name, = and a value"),
        ("--set epochs=x", "tdpo: epochs: got 'x'; expected a whole number"),
        ("--epoch-seconds -1", "--epoch-seconds: got '-1'; expected a number above 0"),
        ("--epoch-seconds nan", "--epoch-seconds: got 'nan'; expected a number above 0"),
        ("--prompts hpsv2=x.txt", "got prompts for hpsv2; expected one of shapes-aesthetic, shapes-alignment"),
        ("--preset sd14-hpsv2", "tdpo: prompt set 'hpd-photo', .*, does not ship .* (--prompts hpsv2=FILE)"),
        ("--preset sd14-hpsv2 --prompts hpsv2=no.txt", "got prompts 'no.txt'; expected a text file"),
    ],
)
def test_what_no_run_could_use_is_refused_before_the_plan(monkeypatch, tmp_path, capsys, arguments, told):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path, "--plan", "--figure", "6", *arguments.split())
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert re.search(told.replace("(", r"\(").replace(")", r"\)"), printed.err), printed.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--set epochs=2", "got --model or --set without --out; expected a file for the results"),
        ("--model x", "got --model or --set without --out"),
        ("--out {}/x.md", "x.md; expected a .jsonl in a folder that is there"),
        ("--out {}/no/x.jsonl", "x.jsonl; expected a .jsonl in a folder that is there"),
        ("--out {}/damaged.jsonl", "damaged.jsonl is damaged (line 1: got 5; expected an object); remove it"),
    ],
)
def test_the_page_that_ships_and_what_is_no_result_stay_as_they_are(monkeypatch, tmp_path, capsys, arguments, told):
    (tmp_path / "damaged.jsonl").write_text("5\n")
    monkeypatch.setattr("sys.argv", ["paper.py", "--page", *arguments.format(tmp_path).split()])
    with pytest.raises(SystemExit) as stopped:
        paper.main()
    assert stopped.value.code == 2 and told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.jsonl"]


def test_prompts_of_one_reward_are_those_of_its_runs_only(monkeypatch, tmp_path, capsys):
    (tmp_path / "photos.txt").write_text("a photo of a cat\n")
    photos = str(tmp_path / "photos.txt")
    world = world_of("sd14-hpsv2", {}, {"hpsv2": photos})
    assert world.config("tdpo", 1).prompts == photos
    assert world.config("tdpo/1", 1).prompts == "simple-animals"
    run(monkeypatch, tmp_path, "--plan", "--figure", "6", "--preset", "sd14-hpsv2", "--prompts", f"hpsv2={photos}")
    assert "in all 15 runs" in capsys.readouterr().out


def test_the_page_tells_the_whole_command(monkeypatch, tmp_path):
    given = "--preset sd14-hpsv2 --model x.safetensors --prompts hpsv2=p.txt --set epochs=2 policy.rank=8 --seeds 3"
    run(monkeypatch, tmp_path, "--page", *given.split())
    assert f"`python benchmarks/paper.py --all {given}`" in (tmp_path / "out.md").read_text(encoding="utf-8")


# --- the page


def rows(text: str) -> Iterator[list[str]]:
    for each in text.splitlines():
        if each.startswith("| "):
            yield [cell.strip() for cell in each.strip("|").split("|")]


def test_the_page_decides_by_what_was_found(work, monkeypatch):
    monkeypatch.setattr(paper, "FIGURES", {name: FIGURES[name] for name in ("3", "6", "7", "13", "rivals")})
    keeps = {"tdpo-r": 0.1, "tdpo": 0.2, "tdpo, dormant reset": 0.15, "tdpo, all reset": 0.1}
    lines = [
        line(work, key, seed, finished(loss + 0.001 * seed * (key == "tdpo")))
        for key, loss in keeps.items()
        for seed in range(1, 6)
    ]
    lines += [line(work, "refl", seed, finished(0.1, gain=1.0 + 0.2 * seed)) for seed in range(1, 6)]
    write(work.out, lines)
    paper.write_page(work)
    text = work.out.with_suffix(".md").read_text(encoding="utf-8")
    found = {(cells[1], cells[2]): cells[4:] for cells in rows(text) if len(cells) == 6}
    assert found["tdpo-r and tdpo", "gold"] == ["5", "confirmed"]
    assert found["tdpo and tdpo, dormant reset", "others"] == ["5", "contradicted"]
    assert found["tdpo-r and tdpo, all reset", "gold"] == ["5", "not seen"]
    assert found["tdpo and ddpo-100", "gold"] == ["0", "undecided"]
    summary = next(cells for cells in rows(text) if cells[0] == "7")
    assert summary[2:] == ["2", "2", "2", "", ""]
    assert next(cells for cells in rows(text) if cells[0] == "6")[-1] == "5"  # runs of "tdpo, kl" to be done
    refl = next(cells for cells in rows(text) if cells[0] == "refl")
    assert refl[1:3] == ["+1.2", "4 of 5"]  # smoothed, the end of the first seed's run is 13/14 of 1.2
    assert refl[4] == "2.8"  # 13/14 of the second's 1.4 are 1.3, so it is there after 14 epochs of 12 seconds
    assert next(cells for cells in rows(text) if cells[0] == "sdpo")[1] == "not run yet"
    gained = [cells for cells in rows(text) if cells[0] == "refl"][-1]
    assert gained[1:] == ["+1.486 ± 0.365 (5)", "", ""]  # 13/14 of 1.6 on average
    assert "(paper-7.png)" in text and work.out.with_name("paper-7.png").exists()
    assert "paper-13.png" not in text


def test_curves_of_snapshots_are_drawn_from_their_lines(work, monkeypatch):
    monkeypatch.setattr(paper, "FIGURES", {name: FIGURES[name] for name in ("11", "12", "rivals")})
    key, unseen = "tdpo/1", SHAPES.sets[0]
    of_second = finished(0.1) | {"shapes-aesthetic": [0.5] * 15, "shapes-aesthetic std": [0.5] * 15}
    write(work.out, [line(work, key, seed, of_second, prompts=unseen) for seed in (1, 2)])
    drawn = []
    monkeypatch.setattr(paper, "draw_setups", lambda axes, curves, several: drawn.append(curves) or {})
    paper.write_page(work)
    assert len(drawn) == 4  # the panels of one training reward: three held-out rewards and the gold measure
    (points,) = drawn[0].values()
    assert points[-1].x == pytest.approx(1.5)  # not smoothed
    assert work.out.with_name("paper-11.png").exists() and not work.out.with_name("paper-12.png").exists()


def test_a_variant_looks_alike_in_all_figures():
    """If the first figure shows it; no two of a figure look alike."""
    main = paper.numbers_of(FIGURES["2"])
    for figure in FIGURES.values():
        numbers = paper.numbers_of(figure)
        looks = {str(_look_of(number)) for number in numbers.values()}
        assert len(looks) == len({*map(paper.name_of, figure.shows)})
        assert all(numbers[name] == number for name, number in main.items() if name in numbers)


def test_one_seed_has_no_interval():
    assert [pairs.with_interval(values) for values in ([], [0.5], [0.5, 0.5])] == ["-", "+0.500", "+0.500 ± 0.000"]


def test_a_page_without_results_says_so(work):
    assert work.held() == {}
    paper.write_page(work)
    text = work.out.with_suffix(".md").read_text(encoding="utf-8")
    assert "Not run yet" in text and ".png" not in text
    work.out.with_name(paper.WHOLE).touch()
    paper.write_page(work)
    assert text.strip() in (told := work.out.with_suffix(".md").read_text(encoding="utf-8"))
    assert "![All weights](full-neurons.png)" in told
