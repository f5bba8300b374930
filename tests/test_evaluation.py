"""What an evaluation scores and keeps, and what it says of known scores."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from toy import Brightness, new_run

from comfy_tdpo.rollout import Decoder, draw_images
from comfy_tdpo.trainer.evaluation import work
from comfy_tdpo.trainer.evaluation.asked import Asked, Options, PromptSet, Subject, ask, usual_folder
from comfy_tdpo.trainer.evaluation.files import Place, Results, places_of
from comfy_tdpo.trainer.evaluation.numbers import Evaluation, Point, interval, setups_of
from comfy_tdpo.trainer.evaluation.table import markdown, told
from comfy_tdpo.trainer.plots.evaluation import cross_reward_figure, draw_setups, efficiency_figure
from comfy_tdpo.trainer.recommend.files import BASE, Cell
from comfy_tdpo.trainer.run import RunFolder

CPU = torch.device("cpu")
ONE, TWO = PromptSet("one", ("a red circle", "a blue star")), PromptSet("two", ("a green cross",))
OPTIONS = Options(rewards=("shapes-match",), sets=(ONE, TWO), images=2)
TRAINING = "shapes-aesthetic"


@pytest.fixture
def trained(make_policy):
    """A policy whose LoRA is a random one, drawn for a run's seed and an epoch."""

    def trained(seed: int, epoch: int):
        policy = make_policy(steps=2, seed=1, rank=4)
        generator = torch.Generator().manual_seed(100 * seed + epoch)
        for name, parameter in policy.trainable.parameters.items():
            if "lora_B" in name:
                parameter.data.normal_(0, 2, generator=generator)
        return policy

    return trained


@pytest.fixture
def runs(tmp_path, trained) -> list[RunFolder]:
    """Two runs of different seeds, with LoRAs of epochs 2 and 3, of which the last is the newest."""
    settings = {"steps": 3, "eval_steps": 2, "policy": {"rank": 4}}
    runs = [new_run(tmp_path / f"run-{seed}", seed=seed, **settings) for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        run.latest_lora.parent.mkdir()
        for epoch, files in ((2, [run.lora(2)]), (3, [run.lora(3), run.latest_lora])):
            for file in files:
                trained(seed, epoch).trainable.export(file, {"epoch": str(epoch)})
    return runs


class Darkness(Brightness):
    name = "darkness"

    def score(self, images, prompts):
        return -super().score(images, prompts)


@pytest.fixture
def make(monkeypatch, make_policy):
    """What makes a run's policy; rewards are brightness, and its opposite for all but the training reward."""

    def load(asked, names, device):
        judges = {}
        for name in asked.rewards:
            if name in names:
                judges[name] = Brightness() if name == TRAINING else Darkness()
                judges[name].name = name
        return judges

    monkeypatch.setattr(work, "_load_rewards", load)
    return lambda config, device: make_policy(
        steps=config.steps, eval_steps=config.eval_steps, seed=1, rank=config.policy.rank
    )


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def evaluate(runs: list[RunFolder], options: Options, *how: Any, **more: Any) -> Evaluation:
    return work.evaluate(ask(runs, options, in_graph=True), *how, **more)


# --- what is scored


def test_there_is_a_line_for_the_base_model_and_for_each_snapshot_on_each_set(runs, make, tmp_path):
    evaluate(runs, OPTIONS, tmp_path / "out", CPU, make)
    lines = lines_of(tmp_path / "out")
    expected = [("base", 0), ("run-1", 2), ("run-1", 3), ("run-2", 2), ("run-2", 3)]
    assert [(line["run"], line["epoch"], line["prompts"]) for line in lines] == [
        (*snapshot, prompts) for snapshot in expected for prompts in ("one", "two")
    ]
    for line in lines:
        count = {"one": 4, "two": 2}[line["prompts"]]
        assert {name: len(scores) for name, scores in line["scores"].items()} == {
            TRAINING: count,
            "shapes-match": count,
        }
        assert line["scores"]["shapes-match"] == [-score for score in line["scores"][TRAINING]]
    assert [line.get("seed") for line in lines[::2]] == [None, 1, 1, 2, 2]
    assert lines[2]["reward_queries"] == 2 * 8, "as many as epoch 2 has by the configuration, as nothing was logged"


def test_scores_are_those_of_the_lora_on_the_same_noise_to_the_bit(runs, make, trained, tmp_path):
    """By hand: the noise depends on the prompt and its number alone, not on the run."""
    evaluate(runs, OPTIONS, tmp_path / "out", CPU, make)
    found = {
        (line["run"], line["epoch"], line["prompts"]): line["scores"][TRAINING] for line in lines_of(tmp_path / "out")
    }
    prompts = [prompt for prompt in ONE.prompts for _ in range(2)]
    seeds = [(42, "evaluate", prompt, number) for prompt in ONE.prompts for number in range(2)]
    seen = set()
    for run, seed, epoch in (("base", 0, 0), ("run-1", 1, 2), ("run-2", 2, 3)):
        policy = trained(seed, epoch)
        if not seed:
            for name, parameter in policy.trainable.parameters.items():
                parameter.data *= "lora_B" not in name
        with torch.no_grad():
            images = draw_images(Decoder(policy, 2), prompts, seeds, 2)
        assert Brightness().score(images, prompts).tolist() == found[run, epoch, "one"]
        seen.add(fmean(found[run, epoch, "one"]))
    assert len(seen) == 3, "the LoRAs make a difference"


def test_the_epochs_asked_for_are_evaluated(runs, make, tmp_path):
    evaluate(runs, replace(OPTIONS, epochs=(2,)), tmp_path / "two", CPU, make)
    assert {line["epoch"] for line in lines_of(tmp_path / "two")} == {0, 2}
    runs[0].lora(3).unlink()
    runs[0].latest_lora.unlink()
    assert [cell.epoch for s in ask(runs, replace(OPTIONS, epochs=("last",))).subjects for cell in s.cells] == [2, 3]


def test_runs_whose_loras_have_another_shape_are_evaluated_together(runs, make_policy, make, tmp_path):
    other = new_run(tmp_path / "rank-2", seed=1, steps=2, policy={"rank": 2})
    file = other.lora(1)
    file.parent.mkdir()
    make_policy(steps=2, seed=1, rank=2).trainable.export(file, {"epoch": "1"})
    made = []

    def make_and_note(config, device):
        made.append(config.policy.rank)
        return make(config, device)

    found = evaluate([*runs, other], OPTIONS, tmp_path / "out", CPU, make_and_note)
    (subject,) = found.asked.subjects[2:]
    base, still = Place(None, BASE, ONE), Place(subject, subject.cells[0], ONE)
    assert found.results.scores(base) == found.results.scores(still), "its LoRA has no effect"
    assert made[:2] == [4, 2], "once for both runs of one rank"


# --- going on


class Interrupt(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_to_the_same_files(runs, make, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate(runs, OPTIONS, whole, CPU, make)
    for stop in (2, 10, 10):  # images from where it goes on, in mid-line or between two

        def watch(phase, done, total, stop=stop):
            if done >= stop:
                raise Interrupt

        with pytest.raises(Interrupt):
            evaluate(runs, OPTIONS, parts, CPU, make, watch=watch)
        with (parts / "evaluation.jsonl").open("a") as file:
            file.write('{"run": "run-1", "epo')  # cut off by a power failure
    assert len(lines_of_whole(parts)) == 6, "of 0, 3 and 3 lines of 4 or 2 images"
    seen = []
    evaluate(runs, OPTIONS, parts, CPU, make, watch=lambda *progress: seen.append(progress))
    assert seen[0] == ("evaluating", 0, 12) and seen[-1] == ("evaluating", 12, 12), "of 30 images, 18 were scored"
    assert made_by(whole) == made_by(parts)
    again = made_by(parts)
    evaluate(runs, OPTIONS, parts, CPU, never, watch=lambda *progress: seen.append(progress))
    assert seen[-1] == ("evaluating", 0, 0) and made_by(parts) == again


def never(config, device):
    raise AssertionError("nothing is left to draw")


def lines_of_whole(folder: Path) -> list[str]:
    return (folder / "evaluation.jsonl").read_text().split("\n")[:-1]


def made_by(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_only_what_is_new_is_scored(runs, make, tmp_path):
    out = tmp_path / "out"
    evaluate(runs[:1], OPTIONS, out, CPU, make)
    before = (out / "evaluation.jsonl").read_bytes()
    found = evaluate(runs, replace(OPTIONS, rewards=("shapes-match", "shapes-judge")), out, CPU, make)
    after = (out / "evaluation.jsonl").read_bytes()
    assert after.startswith(before)
    new = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert [list(line["scores"]) for line in new] == [["shapes-judge"]] * 6 + [
        [TRAINING, "shapes-match", "shapes-judge"]
    ] * 4
    assert set(found.results.scores(places_of(found.asked)[0])) == {TRAINING, "shapes-match", "shapes-judge"}
    evaluate(runs, OPTIONS, out, CPU, make)
    assert [line["run"] for line in lines_of(out)[12:]] == ["run-2"] * 4
    evaluate(runs, replace(OPTIONS, images=1), out, CPU, make)
    assert len(lines_of(out)) == 16 + 10, "other images"


def test_a_damaged_file_and_one_in_use_are_named(runs, make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with work.locked(out), pytest.raises(ValueError, match="in use by another evaluation.*--out DIR"):
        evaluate(runs, OPTIONS, out, CPU, make)
    (out / "evaluation.jsonl").write_text('{"run": 3}\n')
    with pytest.raises(ValueError, match=r"evaluation.jsonl is damaged .*; delete it"):
        evaluate(runs, OPTIONS, out, CPU, make)


# --- what is said of known scores


def known(tmp_path, values: dict[tuple[str, int], dict[str, list[float]]], **settings) -> Evaluation:
    """An evaluation of runs "ALGORITHM-SEED", with the scores of (run or base, epoch) on the set of two prompts."""
    subjects = []
    for name in dict.fromkeys(name for name, _ in values if name != "base"):
        algorithm, _, seed = name.rpartition("-")
        run = new_run(tmp_path / name, algorithm=algorithm, seed=int(seed), **settings)
        cells = tuple(Cell(e, 1.0, Path(f"{e}"), f"{name} {e}", "") for owner, e in values if owner == name)
        subjects.append(Subject(run, run.config, cells))
    rewards = tuple(next(iter(values.values())))
    images = len(next(iter(values["base", 0].values()))) // 2
    asked = Asked(tuple(subjects), (ONE,), rewards, images, {})
    results = Results(tmp_path, asked)
    for place in places_of(asked):
        results.append(place, values[place.subject.name if place.subject else "base", place.cell.epoch])
    return Evaluation(asked, results)


def test_intervals_are_students():
    """Of tables: 12.706 for one degree of freedom, 4.303 for two."""
    assert interval([1.0, 3.0]) == (2.0, pytest.approx(12.7062, rel=1e-5))
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.30265 / 3**0.5, rel=1e-5))
    assert interval([5.0]) == (5.0, 0.0)


SEEDS = {
    ("base", 0): {TRAINING: [1.0, 1.0], "shapes-gold": [0.9, 0.7]},
    ("tdpo-1", 2): {TRAINING: [2.0, 2.0], "shapes-gold": [0.6, 0.6]},
    ("tdpo-1", 4): {TRAINING: [4.0, 4.0], "shapes-gold": [0.1, 0.3]},
    ("tdpo-2", 2): {TRAINING: [3.0, 3.0], "shapes-gold": [0.6, 0.8]},
    ("tdpo-1", 3): {TRAINING: [9.0, 9.0], "shapes-gold": [0.0, 0.0]},
    ("tdpo-2", 4): {TRAINING: [5.0, 5.0], "shapes-gold": [0.4, 0.4]},
    ("ddpo-2-1", 4): {TRAINING: [1.5, 2.5], "shapes-gold": [0.9, 0.5]},
}


def test_curves_go_through_the_means_of_the_seeds_with_their_intervals(tmp_path):
    """Over the epochs that all seeds have; a single run has no band."""
    found = known(tmp_path, SEEDS)
    tdpo, ddpo = found.setups
    cross = found.curve(tdpo, ONE, "shapes-gold", against=TRAINING)
    assert [(point.epoch, point.x) for point in cross] == [(0, 1.0), (2, 2.5), (4, 4.5)]
    assert [point.y for point in cross] == pytest.approx([0.8, 0.65, 0.3])
    half = 12.7062 * 0.1 / 2  # of 0.6 and 0.7, and of 0.2 and 0.4, which is twice as much
    assert [point.high - point.y for point in cross] == pytest.approx([0.0, half, 2 * half], rel=1e-4)
    assert [point.y - point.low for point in cross] == pytest.approx([0.0, half, 2 * half], rel=1e-4)
    efficiency = found.curve(ddpo, ONE, TRAINING)
    assert [tuple(point) for point in efficiency] == [(0, 0, 1.0, 1.0, 1.0), (4, 4 * 8, 2.0, 2.0, 2.0)]


def test_reward_queries_are_those_that_were_logged(tmp_path):
    run = new_run(tmp_path / "run")
    run.append_metrics({"epoch": 1, "reward_queries": 99})
    subject = Subject(run, run.config, ())
    assert (subject.queries(1), subject.queries(2)) == (99, 16), "8 images an epoch"


def test_changes_are_paired(tmp_path):
    found = known(tmp_path, SEEDS)
    tdpo, ddpo = found.setups
    gold = found.change(ddpo, 4, ONE, "shapes-gold")  # of 0 and -0.2
    assert gold == (pytest.approx(-0.1), pytest.approx(12.7062 * 0.1, rel=1e-4))
    assert found.change(tdpo, 2, ONE, "shapes-gold").mean == pytest.approx(-0.15)


def test_runs_that_differ_only_in_their_seed_are_a_setup(tmp_path):
    def subject(name, **settings):
        run = new_run(tmp_path / name, **settings)
        return Subject(run, run.config, ())

    a, b = subject("a-1", seed=1), subject("a-2", seed=2, epochs=5, eval_rewards=["shapes-gold"], micro_batch=1)
    c, d = subject("c-1", seed=1, policy={"lr": 0.01}), subject("d", algorithm="ddpo-2")
    setups = setups_of([a, d, c, b])
    assert [[s.name for s in setup.subjects] for setup in setups] == [["a-1", "a-2"], ["d"], ["c-1"]]
    assert [setup.label for setup in setups] == ["a", "ddpo-2", "c-1"], "by its algorithm, if no other has it"
    others = subject("a-3", seed=3, steps=9), subject("a-4", seed=4, steps=9)
    assert [setup.label for setup in setups_of([a, b, *others])] == ["a-1", "a-3"], "both begin with an a"


def test_snapshots_of_equal_reward_are_those_nearest_to_what_all_reach(tmp_path):
    base = {("base", 0): {TRAINING: [1.0, 1.0]}}
    one = {("tdpo-1", epoch): {TRAINING: [reward] * 2} for epoch, reward in ((1, 2.0), (2, 3.2), (3, 5.0))}
    two = {("ddpo-2-1", epoch): {TRAINING: [reward] * 2} for epoch, reward in ((1, 1.0), (2, 3.0), (3, 2.9))}
    chosen = known(tmp_path, base | one | two).at_equal_reward(TRAINING, ONE)
    assert [(c.label, c.cell.epoch, c.reward) for c in chosen] == [("tdpo", 2, 3.2), ("ddpo-2", 2, 3.0)]


# --- tables and pictures


def test_the_tables_have_the_numbers(tmp_path):
    found = replace(known(tmp_path, SEEDS), pictures=("cross.png",))
    rows = [line.split() for line in told(found).splitlines()]
    drawn = found.asked.subjects[0].config.drawn_with_told.split()
    assert rows[0] == ["one:", "2", "prompts,", "1", "image", "each", *f"({' '.join(drawn)})".split()]
    assert rows[1] == ["epoch", "queries", TRAINING, "shapes-gold"]
    assert rows[2:] == [
        ["base", "-", "0", "1.00", "0.800"],
        ["tdpo", "(2", "runs)", "2", "16", "2.50", "0.650"],
        ["tdpo", "(2", "runs)", "4", "32", "4.50", "0.300"],
        ["ddpo-2", "4", "32", "2.00", "0.700"],
    ]
    written = markdown(found)
    assert "| ddpo-2 | 4 | 32 | 2.00 (+1.00 ± 6.35) | 0.700 (-0.100 ± 1.271) |" in written
    assert "| base | - | 0 | 1.00 | 0.800 |" in written and written.endswith("![cross](cross.png)\n")


def test_the_pictures_show_what_there_is(runs, make, tmp_path):
    out = tmp_path / "out"
    found = evaluate(runs, OPTIONS, out, CPU, make)
    names = ["cross-reward-shapes-aesthetic.png", "efficiency-shapes-aesthetic.png"]
    names += [f"equal-reward-shapes-aesthetic-{prompts}.png" for prompts in ("one", "two")]
    assert list(found.pictures) == names and all((out / name).is_file() for name in names)
    assert Image.open(out / names[0]).width == 1600
    assert len(list((out / "images").iterdir())) == 2 * 3, "of the base model and one set-up, three prompts"
    evaluate(runs, replace(OPTIONS, rewards=()), tmp_path / "alone", CPU, make)
    assert not (tmp_path / "alone" / names[0]).exists(), "no other reward"


def test_bands_are_drawn_where_there_are_several_seeds(tmp_path):
    """The colour of the second seed's spread, pale blue, is only there with it."""

    def pale(image: Image.Image) -> int:
        import numpy as np

        pixels = np.asarray(image).astype(int)
        blue = 0.15 * np.array([0x00, 0x72, 0xB2]) + 0.85 * 255
        return int((abs(pixels - blue) < 2).all(-1).sum())

    both = known(tmp_path / "both", SEEDS)
    one = known(tmp_path / "one", {key: value for key, value in SEEDS.items() if key[0] != "tdpo-2"})
    for figure in (cross_reward_figure, efficiency_figure):
        assert pale(figure(both, TRAINING)) > 1000 and pale(figure(one, TRAINING)) < 100


def test_intervals_are_bars_where_a_curve_goes_back():
    def drawn(*gains: float) -> list[str]:
        axes = Figure().subplots()
        points = [Point(epoch, x, 0.5, 0.4, 0.6) for epoch, x in enumerate(gains)]
        draw_setups(axes, {0: points, 1: [point._replace(x=point.epoch) for point in points]}, several={0})
        return [type(shape).__name__ for shape in axes.collections]

    assert drawn(0, 1, 2) == ["FillBetweenPolyCollection"] and drawn(0, 2, 1) == ["LineCollection"]


def test_the_usual_folder_is_the_runs_or_the_one_that_holds_them(tmp_path):
    a, b, c = (new_run(tmp_path / name) for name in ("x/a", "x/b", "y/c"))
    assert usual_folder([a]) == (tmp_path / "x" / "a" / "evaluation").resolve()
    assert usual_folder([a, b]) == (tmp_path / "x" / "evaluation").resolve()
    assert usual_folder([a, c]) == (tmp_path / "evaluation").resolve()
