"""What the Evaluate node's inputs ask for, and what the browser is told of a run's evaluation."""

import json

import pytest
from PIL import Image
from test_evaluation import SEEDS, known
from toy import new_run

from comfy_tdpo.nodes.runs import answers
from comfy_tdpo.nodes.runs.evaluation import options
from comfy_tdpo.nodes.runs.registry import Runs
from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
from comfy_tdpo.nodes.runs.wording import in_words_of_nodes
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.trainer.evaluation.asked import Asked, Options
from comfy_tdpo.trainer.evaluation.table import markdown, tables_in


def test_nothing_asked_for_is_everything_usual():
    assert options(None, "auto", "", 4, "") == Options()


def test_inputs_become_options():
    chain = RewardChoice({"shapes-gold": 2.0}).with_reward("hpsv2", 1.0, "/a/HPS.pt")
    found = options(chain, "shapes-unseen", "", 2, " 5, last")
    (prompts,) = found.sets
    assert (prompts.name, list(prompts.prompts)) == ("shapes-unseen", load_prompts("shapes-unseen"))
    assert (found.rewards, found.weights) == (("shapes-gold", "hpsv2"), {"hpsv2": "/a/HPS.pt"})
    assert (found.images, found.epochs) == (2, (5, "last"))


def test_prompts_that_clip_reads_otherwise_are_other_images(tmp_path):
    """Of the same words, and so of the same noise."""
    found = known(tmp_path, SEEDS).asked.subjects[:1]
    texts = ("a red circle\n# mine\na red circle", "a (red:1.3) circle", "a (red:1.5) circle")
    sets = [options(None, "shapes-unseen", text, 4, "").sets[0] for text in texts]
    assert [prompts.prompts for prompts in sets] == [("a red circle",)] * 3
    assert [dict(prompts.written) for prompts in sets[:2]] == [{}, {"a red circle": "a (red:1.3) circle"}]
    drawings = {Asked(found, (prompts,), (), 4, {}).drawing(prompts) for prompts in sets}
    assert len(drawings) == 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt_set": "/etc/hostname"}, "got prompt_set '/etc/hostname'; expected one of auto"),
        ({"epochs": "5 10"}, "got epochs '5 10'; expected numbers of epochs with commas between them"),
        ({"epochs": "-1"}, "or 'last': leave it empty for all snapshots"),
        ({"images": 0}, "got 0 images; expected 1 to 256 per prompt"),
        ({"text": "a {red|blue} circle"}, "the text of prompts has alternatives of dynamic prompts in line 1"),
        ({"text": "a circle\na (circle:1.2)\na"}, "differs from an earlier line only in its weights"),
    ],
)
def test_what_is_not_understood_is_one_sentence(inputs, message):
    given = {"rewards": None, "prompt_set": "auto", "text": "", "images": 4, "epochs": ""} | inputs
    with pytest.raises(ValueError) as error:
        options(**given)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "reworded"),
    [
        ("expected prompts: name sets or files with --prompts SET,SET", "choose a prompt_set, or write prompts"),
        ("expected some of those it has (3, 6) in --epochs, or 'last'", "(3, 6) in epochs, or 'last'"),
        ("in use by another evaluation; wait for it, or choose another with --out DIR", "evaluation; wait for it"),
        ("'/x/evaluation' is a file; choose another with --out DIR", "is a file: rename it"),
        ("take it out of --rewards", "take it out of rewards"),
    ],
)
def test_advice_is_in_the_words_of_the_graph(text, reworded):
    assert in_words_of_nodes(text).endswith(reworded)


def test_tables_are_read_as_they_were_written(tmp_path):
    found = known(tmp_path, SEEDS)
    (table,) = tables_in(markdown(found))
    assert table["title"].startswith("one: 2 prompts, 1 image each (")
    assert table["rows"][0] == ["runs", "epoch", "reward queries", "shapes-aesthetic", "shapes-gold"]
    assert table["rows"][1] == ["base", "-", "0", "1.00", "0.800"]
    assert table["rows"][-1] == ["ddpo-2", "4", "32", "2.00 (+1.00 ± 6.35)", "0.700 (-0.100 ± 1.271)"]
    assert tables_in("## a\n\n| x\\|y | z |\n| --- | --- |\n| 1 | 2 |") == [
        {"title": "a", "rows": [["x|y", "z"], ["1", "2"]]}
    ]


def test_the_browser_is_told_of_the_last_evaluation(tmp_path):
    runs = Runs(tmp_path / "runs", tmp_path / "loras")
    run = new_run(tmp_path / "runs" / "mine")
    for ask in (lambda: answers.evaluation(runs, "mine"), lambda: answers.picture(runs, "mine", "evaluation")):
        assert ask() == (404, {"error": "run 'mine' has not been evaluated yet; run a TDPO Evaluate node"})
    folder = run.path / "evaluation"
    folder.mkdir()
    (folder / "evaluation.md").write_text(markdown(known(tmp_path, SEEDS)), encoding="utf-8")
    for name, colour in (("efficiency-x", "blue"), ("equal-reward-x-one", "green")):
        Image.new("RGB", (4, 4), colour).save(folder / f"{name}.png")
    status, told = answers.evaluation(runs, "mine")
    assert status == 200 and json.loads(json.dumps(told))["tables"][0]["rows"][1][0] == "base"
    assert answers.picture(runs, "mine", "evaluation") == (200, (folder / "efficiency-x.png").read_bytes())
    Image.new("RGB", (4, 4), "red").save(folder / "cross-reward-x.png")
    assert answers.picture(runs, "mine", "evaluation") == (200, (folder / "cross-reward-x.png").read_bytes())
    assert answers.evaluation(runs, "nobody")[0] == 404
