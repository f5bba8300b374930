"""The trainer's messages as users of the nodes read them: in words of widgets and wires, not of the command line."""

import ast
import itertools
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
from comfy_tdpo.nodes.runs.settings import INPUTS, NUMBERS
from comfy_tdpo.nodes.runs.start import prepare, start, wait_for
from comfy_tdpo.nodes.runs.wording import in_words_of_nodes, words_of_nodes
from comfy_tdpo.rewards import FORMS, weights
from comfy_tdpo.trainer.config import leaf_fields
from comfy_tdpo.trainer.config.changes import changeable

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
IMAGE = torch.zeros(1, 64, 64, 3)

# Modules none of whose texts can reach a node.
COMMAND_LINE = {
    "trainer/__main__.py": "the command line itself",
    "trainer/terminal/": "the command line's output",
    "comfy_tdpo/shapes/build.py": "a command that makes the world of Shapes",
    "comfy_tdpo/rewards/function.py": "users' functions, which are for the command line alone",
    "trainer/alarm.py": "for the log and the summary; the node has sentences of its own",
    "nodes/runs/wording.py": "the translation itself, full of what it translates",
}
# What placeholders stand for, by their expression; anything else becomes X.
FILLED = {
    "role": ["rewards", "eval_rewards"],
    "folders": ["", "at '/m/tdpo_rewards/a.pt', or "],
    "reason": ["you have no permission to write to '/m'", "'/m/x' is a file"],
    "remedy": ["choose another", "mount or create that, or choose another"],
    "', '.join(changeable())": [", ".join(changeable())],
    "', '.join(changed[:TOLD])": ["kl.gate was False and is True"],
    "' or '.join(meant)": ["policy.lr", "kl.gate", "micro_batch", "eval_rewards", "rewards"],
    "FORMS": [FORMS],
    "_SAME": ["expected the same"],
    "name": ["X", "guard_images", "gate"],
}
FOREIGN = r"(?<![\w-])--[a-z]|\beval_rewards\b|\breward_weights\b|python:module|run directory|command.line"
FOREIGN += r"|(?<!\()\b(policy|critic)\.lr\b|\brewards (?:was|is)\b|\bmean rewards\b|\bfolder .*choose another$"
# Names that cannot be meant as ordinary words, of settings with neither a widget nor a wire.
TELLING = [name for name, _ in leaf_fields() if re.search("[._]", name)]
TELLING = [name for name in TELLING if name not in {*wording.WIRES, *wording.WIDGETS, *INPUTS, *NUMBERS}]
NUMBER = r"(?: -?[\dX][\d.e-]*)?"


def messages(folders=("trainer", "comfy_tdpo", "nodes")) -> Iterator[str]:
    """Every text in these folders but docstrings and what describes settings and inputs, with placeholders filled."""
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if str(path.relative_to(ROOT)).startswith(tuple(COMMAND_LINE)):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        passed_over = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("description", "tooltip", "summary"):
                passed_over |= {id(part) for part in ast.walk(node.value)}
        for node in ast.walk(tree):
            if id(node) in passed_over:
                continue
            if isinstance(node, ast.JoinedStr):
                passed_over |= {id(part) for part in node.values}
                yield from filled(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield node.value


def filled(text: ast.JoinedStr) -> Iterator[str]:
    """The texts that an f-string stands for."""
    parts = [
        [part.value] if isinstance(part, ast.Constant) else FILLED.get(ast.unparse(part.value), ["X"])
        for part in text.values
    ]
    yield from map("".join, itertools.product(*parts))


def untold(text: str) -> list[str]:
    """The settings that `text` names as only the command line knows them."""
    named = [name for name in TELLING if re.search(rf"""(?<![\w./'"-]){re.escape(name)}(?![\w'"=)]|[.-]\w)""", text)]
    widgets = "|".join(map(re.escape, wording.WIDGETS))
    known = re.findall(rf"""(?<![\w./'"(-])(?:{widgets})(?![\w'"]|[.-]\w)""", text)
    marks = (rf"{{}}{NUMBER} \(in settings", r"\({} in settings", r"{} = ")
    return known + [name for name in named if not any(re.search(mark.format(re.escape(name)), text) for mark in marks)]


def test_no_message_speaks_of_the_command_line():
    foreign = [message for message in messages() if re.search(FOREIGN, message)]
    assert len(foreign) > 15, "there are some to find"
    assert [text for message in foreign if re.search(FOREIGN, text := in_words_of_nodes(message))] == []


def test_every_setting_that_a_message_names_is_a_widget_a_wire_or_in_settings():
    found = {message: untold(message) for message in messages() if untold(message)}
    assert len(found) > 25, "there are some to find"
    assert {text: left for message in found if (left := untold(text := in_words_of_nodes(message)))} == {}


def test_what_the_live_node_says_needs_no_translation():
    for message in messages(["nodes/runs"]):
        if not message.startswith((" ", "(")) and re.match(r"[A-Z].*\.$", message):
            assert in_words_of_nodes(message) == message


def test_what_is_reworded_stays_as_it_is():
    for message in map(in_words_of_nodes, messages()):
        assert in_words_of_nodes(message) == message


def test_every_node_rewords_its_errors():
    for path in (ROOT / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "execute":
                assert [ast.unparse(by) for by in node.decorator_list] == ["classmethod", "words_of_nodes()"], path


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
    assert said == "settings: unknown setting 'xyzzy'; the config.toml of any run in output/tdpo lists them all"
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
    assert said == f"{holds}; expected a new or empty one: give the run another name"


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
