"""Rewords the trainer's messages for a graph: in the words of widgets and wires, and without the machine's folders.

The trainer writes for the command line, where settings are options or dotted names. Users of the nodes see neither.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from comfy_tdpo.rewards import FORMS

from ...trainer.config import leaf_fields
from .settings import INPUTS, NUMBERS

CRITIC = "of TDPO Temporal Critic"
WEIGHTS = "weights of TDPO Reward Model"

# Settings with another name in a graph: that of a wire or a widget, or that of a widget although the `settings` text
# takes the setting's own name too.
WIRES = {"eval_rewards": "held_out", "reward_weights": WEIGHTS}
WIDGETS = {
    "policy.rank": "rank",
    "policy.lr": "learning_rate",
    "critic.activation": f"activation {CRITIC}",
    "critic.lr": f"learning_rate {CRITIC}",
    "critic.clip_range": f"clip_range {CRITIC}",
    "neurons.reset": f"reset {CRITIC}",
    "neurons.every": f"reset_every {CRITIC}",
    "neurons.threshold": f"threshold {CRITIC}",
    "neurons.data": f"activation_data {CRITIC}",
}
# What options of the command line are called in a graph; all others have the name of their setting.
OPTIONS = {
    "reward": "reward",
    "eval-reward": "held_out",
    "run-dir": "run_name",
    "resume": "queueing the graph again",
    "print-config": "the config.toml of any run in output/tdpo",
}

# Advice that differs in a graph.
ADVICE = [
    (r"(?<!settings: )\bunknown setting\b", "settings: unknown setting"),
    (rf"(?:, )?{re.escape(FORMS)}\b", ""),
    (
        r"(which sends images to an address; expected) that only on the command line",
        r"\1 one that the owner of this server has allowed by a line in models/tdpo_rewards/services.txt",
    ),
    (r" \(--eval-reward none watches none\)", ""),
    (r"(?:name it|choose another) with --held-out NAME", "connect another reward to held_out"),
    (r"\bname sets or files with --prompts SET,SET", "choose a prompt_set, or write prompts"),
    (r", or choose another with --out DIR\b", ""),
    (r"; choose another with --out DIR\b", ": rename it"),
    (r"take it out of the rewards\b", "take it out of reward and held_out"),
    (r"\brewards was (?=\{)", "reward was "),
    (r"\brewards\.([\w.-]+)(?=: got )", r"weight of \1"),
    (
        r"or put it at (.+?), or into a folder, .*?and say where: reward_weights \S+=FOLDER",
        rf"or put it at \1, or choose its file in {WEIGHTS}",
    ),
    (r"or put it into a folder, .*?and say where: reward_weights \S+=FOLDER", "or put it into models/tdpo_rewards"),
    (r"(as the weights of reward \S+, which has none); remove that setting", rf"\1; set {WEIGHTS} to 'auto'"),
    (r"\bgive the right path\b", f"choose the right file in {WEIGHTS}"),
    (r"\brun directory (.+?); resume it with --resume, or choose another", r"run folder \1; give the run another name"),
    (
        r"\bgot run directory (.+?); expected a new or empty folder: choose another",
        r"got a run_name whose folder is \1; expected a new or empty one: give the run another name",
    ),
    (r"(you have no permission to write to .+?); choose another\b", r"\1; allow ComfyUI to write there"),
    (r"( cannot be created: .+?(?:; |, or ))choose another\b", r"\1give the run another name"),
    (r"\bchoose one on another disk\b", "move ComfyUI's output folder to another disk"),
    (r"\brun directory\b", "run folder"),
    (r"it is a command-line option, --\S+: remove it from the file", "the node has none such: remove it from settings"),
    (r"\bdid you mean rewards\b", "did you mean the wire reward"),
    (r"\bwhich is in rewards too\b", "which is in reward too"),
    (r"\badd it to rewards\b", "connect it to reward"),
    (
        r"expected prediction_type v_prediction: set it if .*? in the model's scheduler_config.json",
        "expected a model that predicts v: connect the MODEL through ComfyUI's ModelSamplingDiscrete, with "
        "v_prediction if the model was trained that way and without zsnr otherwise",
    ),
    (r"\bstart the program with CUBLAS_WORKSPACE_CONFIG=\S+?(?=,)", "start ComfyUI with its option 'deterministic'"),
    (r"\bstart a new run\b(?! \(set resume)", "start a new run (set resume to 'new')"),
]

_OPTION = re.compile(r"(?<![\w'\"-])--([a-z](?:[\w.-]*\w)?)")
_CALLED_OTHERWISE = re.compile(
    rf"""(?<![\w.(/'"-])({"|".join(map(re.escape, WIRES | WIDGETS))})(?!\w|[.-]\w)""",
)
_IN_SETTINGS = {name for name, _ in leaf_fields()} - {*WIRES, *WIDGETS, *INPUTS, *NUMBERS}
_TELLING = "|".join(re.escape(name) for name in sorted(_IN_SETTINGS) if re.search(r"[._]", name))
_PLAIN = "|".join(name for name in sorted(_IN_SETTINGS) if not re.search(r"[._]", name))  # also ordinary words
_NUMBER = r"(?: -?\d[\d.]*(?:e-?\d+)?)?"
_NAMED = re.compile(
    rf"""(?<![\w.(/'"-])({_TELLING}){_NUMBER}(?![\w'"]|[.-]\w| = | \(in settings)"""
    rf"""|\bset ({_PLAIN})\b(?! = | \(in settings)|(?<![\w.'"-])({_PLAIN})(?= (?:was|lists|is empty)\b)"""
)
_MARKED = re.compile(rf"\b({_TELLING}|{_PLAIN}){_NUMBER} \(in settings|\(({_TELLING}|{_PLAIN}) in settings")


def in_words_of_nodes(text: str) -> str:
    """The trainer's `text` in the words of widgets and wires; text that already uses them stays as it is."""
    for pattern, advice in ADVICE:
        text = re.sub(pattern, advice, text)
    text = _OPTION.sub(lambda match: OPTIONS.get(match[1], match[1].replace("-", "_")), text)
    text = _CALLED_OTHERWISE.sub(_called, text)
    return _marked(text)


def _called(match: re.Match[str]) -> str:
    name = match[1]
    return WIRES[name] if name in WIRES else f"{WIDGETS[name]} ({name} in settings)"


def _marked(text: str) -> str:
    """`text` with a note at the first mention of each setting that has neither a widget nor a wire."""
    known = {name for names in _MARKED.findall(text) for name in names}

    def mark(match: re.Match[str]) -> str:
        name = next(filter(None, match.groups()))
        if name in known:
            return match[0]
        known.add(name)
        return f"{match[0]} (in settings)"

    return _NAMED.sub(mark, text)


@contextmanager
def words_of_nodes() -> Iterator[None]:
    """Around a node's `execute`: reword the trainer's errors for the graph."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        text = str(error)
        if (reworded := in_words_of_nodes(text)) != text:
            error.args = (reworded,)
        raise


# An absolute path up to its last part, of Windows or other systems. Its names may contain spaces only between quotes:
# elsewhere, nothing shows where it ends.
_START = r"(?:[A-Za-z]:|~)?[/\\]"
_QUOTED = re.compile(rf"""(['"]){_START}[^'"\n]*[/\\](?=[^'"\n]*\1)""")
_BARE = re.compile(rf"""(?<![\w.~/\\'"]){_START}(?:[^\s/\\'":;,()]+[/\\])+""")


def without_folders(text: str) -> str:
    """`text` with file names, but without their folders."""
    return _BARE.sub("", _QUOTED.sub(r"\1", text))
