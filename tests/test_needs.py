"""What this pack uses of ComfyUI is in one list, and every ComfyUI at hand has all of it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from backends import ROOT, ask, each

from comfy_tdpo.nodes.comfy.needs import MODULES, NEEDS, names

OURS = sorted((ROOT / "nodes").rglob("*.py"))
PACKAGES = {module.partition(".")[0] for module in MODULES}
LINES = [line for line in NEEDS.split("\n") if line]
METHODS = [line for line in LINES if "(self" in line]  # called on objects, which no import leads to

# A use: a dotted name, and how many arguments and which keywords it is called with; None if it is only read.
Use = tuple[str, tuple[int, set[str]] | None]


def imported(tree: ast.AST) -> dict[str, str]:
    """What stands for something of ComfyUI in a file -> what it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= {alias.name.partition(".")[0]: alias.name.partition(".")[0]}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: whole for name, whole in found.items() if whole.partition(".")[0] in PACKAGES}


def uses(source: str) -> Iterator[Use]:
    """Every use of something of ComfyUI in a source; `partial` calls what it is given."""
    tree = ast.parse(source)
    known, seen = imported(tree), set()

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Attribute):
            seen.add(node.value)
            return f"{whole}.{node.attr}" if (whole := dotted(node.value)) else None
        return known.get(node.id) if isinstance(node, ast.Name) else None

    for node in ast.walk(tree):  # from the outside in: a call comes before what it calls
        if isinstance(node, ast.Call):
            by_partial = isinstance(node.func, ast.Name) and node.func.id == "partial"
            called, *args = [*node.args] if by_partial else [node.func, *node.args]
            seen.add(called)
            if name := dotted(called):
                yield name, (len(args), {keyword.arg for keyword in node.keywords if keyword.arg})
        elif isinstance(node, ast.Attribute | ast.Name) and node not in seen and (name := dotted(node)):
            yield name, None


def call_in(line: str) -> tuple[int, set[str]] | None:
    expression = ast.parse(line, mode="eval").body
    if not isinstance(expression, ast.Call):
        return None
    return len(expression.args), {keyword.arg or "" for keyword in expression.keywords}


def is_listed(use: Use, lines: list[str] = LINES) -> bool:
    """Whether a line names it and has the arguments; what is beyond a name that is only read is not ComfyUI's."""
    name, call = use
    for line in lines:
        listed, allowed = line.partition("(")[0], call_in(line)
        if allowed is None and f"{name}.".startswith(f"{listed}.") or call is None and listed.startswith(f"{name}."):
            return True
        if name == listed and (call is None or (allowed and call[0] <= allowed[0] and call[1] <= allowed[1])):
            return True
    return name in MODULES or f"{name}." in {module[: len(name) + 1] for module in MODULES}


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_use_of_comfyui_is_listed(path: Path):
    assert [use for use in uses(path.read_text(encoding="utf-8")) if not is_listed(use)] == []


def test_the_list_has_nothing_that_is_not_used():
    used = {name for path in OURS for name, _ in uses(path.read_text(encoding="utf-8"))}
    ours = [line.partition("(")[0] for line in LINES if line not in METHODS]
    assert [name for name in ours if not any(f"{use}.".startswith(f"{name}.") for use in used)] == []
    assert len(set(names())) == len(LINES) and sorted(LINES) == LINES


@pytest.mark.parametrize(
    "source",
    [
        "import comfy.sd\ncomfy.sd.load_checkpoint('x')",
        "import comfy.utils\ncomfy.utils.ProgressBar(1, node_id=2)",
        "from functools import partial\nimport comfy.sd1_clip\npartial(comfy.sd1_clip.SDTokenizer, other=1)",
        "def f():\n    from comfy import model_management as m\n    m.get_free_memory()",
        "from server import PromptServer\nPromptServer.instance.send_sync(1, 2, 3)",
        "import folder_paths\nfolder_paths.base_path",
    ],
)
def test_what_is_not_listed_is_found(source):
    assert [use for use in uses(source) if not is_listed(use)]


@pytest.mark.parametrize("backend", each())
def test_every_comfyui_has_what_is_listed_and_takes_our_calls(backend):
    found = ask("needs", backend=backend)
    assert found["missing"] == [] and found["calls refused"] == []


@pytest.mark.parametrize("backend", each())
def test_a_comfyui_that_lacks_something_is_told_in_one_line(backend):
    """Whatever does not need it still works; without what every node needs, there are no nodes, and no traceback."""
    lacking = ask("needs", backend=backend)["lacking"]
    assert lacking["convert_lora"] == {
        "nodes": 10,
        "log": [
            "TDPO: this ComfyUI has no comfy.lora_convert.convert_lora; expected 0.3.64 or a later version that has: "
            "update ComfyUI, or this pack if ComfyUI is newer"
        ],
    }
    assert lacking["Custom"]["nodes"] == 0
    (line,) = lacking["Custom"]["log"]
    assert "has no comfy_api.latest.io.Custom; expected" in line
