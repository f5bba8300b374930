"""The trainer's messages as users of the nodes read them: in words of widgets and wires, not of the command line."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import standin
import torch
from fake_training import PLACE, begin, runs_in, wanted

from comfy_tdpo.nodes.comfy.scoring import score
from comfy_tdpo.nodes.runs import answers, wording
from comfy_tdpo.nodes.runs.resume import difference
from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
from comfy_tdpo.nodes.runs.start import prepare, start, wait_for
from comfy_tdpo.nodes.runs.wording import in_words_of_nodes, words_of_nodes
from comfy_tdpo.rewards import weights
from comfy_tdpo.trainer.config import leaf_fields

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
IMAGE = torch.zeros(1, 64, 64, 3)

# Modules that speak on the command line and nowhere else, and what nobody but they may say.
COMMAND_LINE = ("__main__.py", "arguments.py", "build.py", "console.py", "function.py", "score.py")
FOREIGN = r"(?<![\w-])--[a-z]|\beval_rewards\b|\breward_weights\b|python:module|run directory"
FOREIGN += r"|(?<!\()\b(policy|critic)\.lr\b"


def messages() -> Iterator[str]:
    """Every text in the trainer and the library but docstrings, with X for what is filled in."""
    for path in sorted([*(ROOT / "trainer").rglob("*.py"), *(ROOT / "comfy_tdpo").rglob("*.py")]):
        if path.name in COMMAND_LINE:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        passed_over = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
                passed_over |= {id(part) for part in node.values}
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and " " in str(node.value) and id(node) not in passed_over:
                yield str(node.value)


def test_no_message_of_the_trainers_speaks_of_the_command_line():
    foreign = [message for message in messages() if re.search(FOREIGN, message)]
    assert len(foreign) > 5, "there are some to find"
    assert [text for message in foreign if re.search(FOREIGN, text := in_words_of_nodes(message))] == []


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("nothing of ours -- and a-b--c, 'policy.lr' as typed", "nothing of ours -- and a-b--c, 'policy.lr' as typed"),
        ("got resume '--resume'", "got resume '--resume'"),
        ("lower policy.lr; go on", "lower learning_rate (policy.lr in settings); go on"),
        ("put it back, or start a new run", "put it back, or start a new run (set resume to 'new')"),
        ("raise --policy.lr", "raise learning_rate (policy.lr in settings)"),
        ("lower --samples-per-epoch.", "lower samples_per_epoch."),
        ("set policy.gradient_checkpointing to true", "set policy.gradient_checkpointing (in settings) to true"),
        ("set precision to bf16, set epochs to 3", "set precision (in settings) to bf16, set epochs to 3"),
        ("neurons.reset needs", "reset of TDPO Temporal Critic (neurons.reset in settings) needs"),
        ("rewards was {'a': 1.0} and is {'b': 1.0}", "reward was {'a': 1.0} and is {'b': 1.0}"),
    ],
)
def test_words_of_nodes(text, read):
    assert in_words_of_nodes(text) == read
    assert in_words_of_nodes(read) == read, "what is reworded stays as it is"


def raised(ask) -> str:
    with pytest.raises((ValueError, RuntimeError)) as error, words_of_nodes():
        ask()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_configuration_that_cannot_be():
    said = raised(wanted(settings="xyzzy = 1").config)
    assert said == "unknown setting 'xyzzy'; the config.toml of any run in output/tdpo lists them all"
    said = raised(wanted(held_out=RewardChoice({"shapes-aesthetic": 1.0})).config)
    assert said.startswith("held_out lists 'shapes-aesthetic', which is trained on")
    said = raised(wanted(settings="critic.encoder = 'nice'").config)
    assert said.startswith("got reward 'nice'; expected one of ") and "python" not in said
    said = raised(wanted(reward=RewardChoice({"shapes-gold": float("nan")})).config)
    assert said.startswith("weight of shapes-gold: got nan")
    said = raised(wanted(numbers={"learning_rate": 1000.0}).config)
    assert said.startswith("learning_rate (policy.lr in settings): got 1000.0; expected a number above 0")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "micro_batch = 4\nprecision = “bf16”",
            "line 2, .*: TOML does not accept typographic quotes",
        ),
        ("micro_batch: 4", "line 1, 'micro_batch: 4': this looks like YAML"),
        ('{"micro_batch": 4}', "it is JSON; .*: the config.toml of any run in output/tdpo shows an example"),
        ("a = " + "[" * 5000, "its brackets are nested too deeply"),
    ],
    ids=["quotes", "YAML", "JSON", "brackets"],
)
def test_settings_that_are_no_toml_are_told_what_to_do(text, advice):
    said = raised(wanted(settings=text).config)
    assert re.fullmatch(rf"got settings that are not TOML \({advice}.*\); expected lines such as .*", said)


def test_a_run_that_would_be_another(tmp_path):
    runs = runs_in(tmp_path)
    begin(runs).wait(30)

    def changed(**asked) -> str:
        want = wanted(**asked)
        return in_words_of_nodes(difference(runs.find("one"), want.config(), want.prompts()))

    assert changed(held_out=RewardChoice({"shapes-judge": 1.0})) == "", "it may change"
    assert changed(reward=RewardChoice({"shapes-gold": 1.0})).startswith("reward was {'shapes-aesthetic': 1.0} and is")
    rank = {"epochs": 2, "samples_per_epoch": 4, "rank": 8}
    assert re.fullmatch(r"rank \(policy.rank in settings\) was \d+ and is 8", changed(numbers=rank))


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(repo: str, file: str):
        raise OSError("no connection")

    monkeypatch.setattr(weights, "hf_hub_download", offline)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(weights, "_folders", [tmp_path / "tdpo_rewards"])
    said = raised(lambda: score(IMAGE, [""], RewardChoice({"imagereward": 1.0}), CPU))
    assert "no connection" in said and f"or put it at '{tmp_path / 'tdpo_rewards'}" in said
    assert said.endswith("', or choose its file in weights of TDPO Reward Model")
    monkeypatch.setattr(weights, "_folders", [])
    said = raised(lambda: score(IMAGE, [""], RewardChoice({"imagereward": 1.0}), CPU))
    assert said.endswith("or put it into models/tdpo_rewards")
    choice = RewardChoice({"jpeg-compressibility": 1.0}, {"jpeg-compressibility": "/a/b.pt"})
    said = raised(lambda: score(IMAGE, [""], choice, CPU))
    assert said.endswith("which has none; set weights of TDPO Reward Model to 'auto'")


def test_a_folder_that_is_no_runs(tmp_path):
    runs, want = runs_in(tmp_path), wanted()
    run = runs.folder("one")
    run.path.mkdir(parents=True)
    (run.path / "notes.txt").touch()
    said = raised(lambda: prepare(runs, run, want.config(), want.prompts()))
    holds = f"got a run_name whose folder is {str(run.path)!r}, which holds 'notes.txt'"
    assert said == f"{holds}; expected a new or empty one: choose another name"


def test_the_browser_is_told_so_too(tmp_path):
    runs = runs_in(tmp_path)
    begin(runs).wait(30)
    (runs.find("one").path / "metrics.jsonl").write_text("no metrics\n", encoding="utf-8")
    told = answers.metrics(runs, "one", "0")[1]["error"]
    assert told.endswith("delete it: queueing the graph again restores it from the checkpoint")


def test_a_failed_run_says_so_too(tmp_path):
    def diverge(run, stop, watch):
        raise ValueError("diverged: start a new run with a lower policy.lr")

    runs, want = runs_in(tmp_path), wanted()
    run = runs.folder("one")
    prepare(runs, run, want.config(), want.prompts())
    told: list[dict] = []
    job = start(runs, run, diverge, CPU, PLACE, told.append)
    said = "diverged: start a new run (set resume to 'new') with a lower learning_rate (policy.lr in settings)"
    assert raised(lambda: wait_for(job, lambda done, total: None)) == f"run 'one' failed: {said}"
    assert told[-1]["error"] == runs.status(run)["error"] == said


def test_what_has_no_sentence_is_raised_as_it_is():
    for error in (KeyError("--resume"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")):
        with pytest.raises(type(error)) as caught, words_of_nodes():
            raise error
        assert caught.value is error


def test_the_names_are_those_of_settings_and_of_widgets(monkeypatch):
    standin.install(monkeypatch)
    critic, train = (
        {socket.id for socket in getattr(import_module(f"comfy_tdpo.nodes.{module}"), name).define_schema().inputs}
        for module, name in (("temporal_critic", "TemporalCritic"), ("train", "Train"))
    )
    assert {*wording.WIRES, *wording.WIDGETS} <= {name for name, _ in leaf_fields()}
    for widget in wording.WIDGETS.values():
        name, _, where = widget.partition(" of ")
        assert name in (critic if where else train)


def test_nodes_raise_it_so(monkeypatch, tmp_path):
    standin.install(monkeypatch)
    scoring = import_module("comfy_tdpo.nodes.score_images")
    monkeypatch.setattr(scoring, "device_with_room", lambda: CPU)
    with pytest.raises(ValueError, match="take it out of reward and held_out, or train on prompts of Shapes"):
        scoring.ScoreImages.execute(IMAGE, RewardChoice({"shapes-gold": 1.0}), "a photo of a cat")
    runs = runs_in(tmp_path)
    begin(runs).wait(30)
    (runs.find("one").path / "metrics.jsonl").write_text("no metrics\n", encoding="utf-8")
    inspector = import_module("comfy_tdpo.nodes.neuron_inspector").NeuronInspector
    with pytest.raises(ValueError, match="queueing the graph again restores it"):
        inspector.execute(runs.find("one"))
