"""What is declared, what lies on disk and what is imported agree: one arrow, no undeclared file or dependency, nothing
that runs code from data, and a package that imports from wherever it is found.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import comfy_tdpo

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]

# folder -> the name it is imported by; room -> the rooms it may import. Of ComfyUI the schemas need comfy_api alone.
ROOMS = {"comfy_tdpo": "comfy_tdpo", "trainer": "comfy_tdpo.trainer", "nodes": "comfy_tdpo.nodes"}
ARROW = {
    "comfy_tdpo": {"comfy_tdpo"},
    "trainer": {"comfy_tdpo", "trainer"},
    "nodes/runs": {"comfy_tdpo", "trainer", "nodes/runs"},
    "nodes/comfy": {"comfy_tdpo", "trainer", "nodes/runs", "nodes/comfy", "comfy_api", "ComfyUI"},
    "nodes": {"comfy_tdpo", "trainer", "nodes/runs", "nodes/comfy", "nodes", "comfy_api"},
}
COMFYUI = {"comfy", "comfy_api", "comfy_compatibility", "comfy_config", "comfy_execution", "comfy_extras"}
COMFYUI |= {"execution", "folder_paths", "nodes", "server", "utils"}
COMFYUI |= {"aiohttp"}  # which its server is made of

# import name -> distribution, where the two differ.
DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open_clip_torch"}


def room_sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def all_sources() -> list[Path]:
    others = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return [*room_sources(), Path("__init__.py"), *sorted(path.relative_to(ROOT) for path in others)]


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def imported(path: Path, source: str) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, whether by place) of every import in `source`, wherever it stands.

    A string that is such a name, or "module:attribute", counts as an import by name: a registry's, for import_module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = path.parents[node.level - 1]
                package = ROOMS.get(folder.parts[0], "") if folder.parts else "comfy_tdpo"
                base = ".".join(part for part in (package, *folder.parts[1:], base) if part)
            yield from ((f"{base}.{alias.name}", bool(node.level)) for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"comfy_tdpo(\.\w+)+(:\w+)?", str(node.value)):
            yield node.value.replace(":", "."), False


def room_of(name: str) -> str:
    """The room that the import `name` leads to, comfy_api, ComfyUI, or nothing where it is somebody else's."""
    top, *rest = name.split(".")
    if top == "comfy_tdpo":
        return _inner("/".join(rest[:2])) if rest and rest[0] in ("trainer", "nodes") else "comfy_tdpo"
    if top == "comfy_api":
        return top
    return "ComfyUI" if top in COMFYUI else ""


def _inner(place: str) -> str:
    """The room that a path such as nodes/runs or trainer/config lies in."""
    return place if place in ARROW else place.split("/")[0]


def wrong_imports(path: Path, source: str) -> list[str]:
    """The imports in `source`, the file `path` below the root, that go against the arrow or are not spelled our way."""
    here = _inner("/".join(path.parts[:2]))
    wrong = []
    for name, by_place in imported(path, source):
        there = room_of(name)
        if there and there not in ARROW[here]:
            wrong.append(f"{path}: {here} must not import {name} of {there}")
        elif here != "comfy_tdpo" and there == "comfy_tdpo" and by_place:
            wrong.append(f"{path}: import {name} by name, from comfy_tdpo...")
        elif there.startswith(("trainer", "nodes")) and not by_place:
            wrong.append(f"{path}: import {name} by place, from . or ..")
        elif name.split(".")[0] == "trainer":
            wrong.append(f"{path}: {name} is not importable; it is called comfy_tdpo.{name}")
    return wrong


@pytest.mark.parametrize("path", room_sources(), ids=str)
def test_imports_follow_the_arrow(path):
    assert wrong_imports(path, read(path)) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("comfy_tdpo/policy.py", "from comfy_tdpo.trainer.config import TrainConfig"),
        ("comfy_tdpo/policy.py", "from comfy_tdpo import trainer"),
        ("comfy_tdpo/policy.py", "from .trainer import config"),
        ("comfy_tdpo/rewards/shapes.py", "from ..nodes import train"),
        ("comfy_tdpo/rewards/shapes.py", "from .. import nodes"),
        ("comfy_tdpo/rewards/__init__.py", "REWARDS = {'mine': 'comfy_tdpo.nodes.rewards:Mine'}"),
        ("comfy_tdpo/models/components.py", "def load():\n    import comfy.utils"),
        ("trainer/job.py", "from ..nodes.train import Train"),
        ("trainer/job.py", "from server import PromptServer"),
        ("trainer/job.py", "import folder_paths as paths"),
        ("trainer/job.py", "import nodes"),
        ("trainer/job.py", "from ..critic import TemporalCritic"),
        ("trainer/job.py", "from .. import critic"),
        ("trainer/job.py", "from comfy_tdpo.trainer.config import TrainConfig"),
        ("trainer/job.py", "from trainer.config import TrainConfig"),
        ("nodes/train.py", "from comfy_tdpo.trainer.job import Job"),
        ("nodes/train.py", "from ..policy import DiffusionPolicy"),
        ("nodes/train.py", "import folder_paths"),
        ("nodes/train.py", "def execute():\n    from comfy import model_management"),
        ("nodes/comfy/executor.py", "from ..train import Train"),
        ("nodes/comfy/executor.py", "from ...policy import DiffusionPolicy"),
        ("nodes/runs/start.py", "import comfy.model_management"),
        ("nodes/runs/start.py", "from comfy_api.latest import io"),
        ("nodes/runs/start.py", "def stop():\n    from server import PromptServer"),
        ("nodes/runs/start.py", "from ..comfy.folders import all_runs"),
        ("nodes/runs/start.py", "from .. import comfy"),
        ("nodes/runs/start.py", "from ..train import Train"),
        ("nodes/runs/start.py", "from comfy_tdpo.nodes.runs.registry import Runs"),
    ],
)
def test_the_arrow_finds(path, line):
    assert len(wrong_imports(Path(path), line)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("comfy_tdpo/rewards/shapes.py", "from ..shapes.gold import gold_scores"),
        ("comfy_tdpo/policy.py", "'python -m comfy_tdpo.trainer'"),
        ("trainer/job.py", "from .config import TrainConfig"),
        ("trainer/job.py", "from comfy_tdpo.methods.critic import TemporalCritic"),
        ("trainer/job.py", "from comfy_tdpo import __version__, neurons"),
        ("nodes/train.py", "from ..trainer.job import Job"),
        ("nodes/train.py", "from comfy_api.latest import io"),
        ("nodes/train.py", "from .comfy.sockets import Run"),
        ("nodes/comfy/lora.py", "import comfy.sd"),
        ("nodes/comfy/lora.py", "from ..runs.snapshots import read_lora"),
        ("nodes/runs/start.py", "from ...trainer import job as jobs"),
        ("nodes/runs/start.py", "from .registry import Runs"),
    ],
)
def test_the_arrow_allows(path, line):
    assert wrong_imports(Path(path), line) == []


def unsafe(source: str, shipped: bool = True) -> list[str]:
    """What in `source` can run code that came as data; where it is `shipped`, starting programs counts too."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    modules |= {"subprocess"} if shipped else set()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name.split(".")[0] in modules or name == "torch.load"]
        elif isinstance(node, ast.Call):
            callee = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if callee in ("eval", "exec", "builtins.eval", "builtins.exec"):
                found.append(callee)
            elif callee == "torch.load" and keywords.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            elif keywords.get("allow_pickle", "False") != "False":
                found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", all_sources(), ids=str)
def test_nothing_runs_code_from_data(path):
    assert unsafe(read(path), shipped=path.parts[0] in (*ROOMS, "__init__.py")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import subprocess as s",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, map_location='cpu', weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path, allow_pickle=True)",
        "eval('1 + 1')",
        "exec(text, {})",
        "from builtins import print\nbuiltins.exec(text)",
    ],
)
def test_unsafe_finds(source):
    assert len(unsafe(source)) == 1


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.load(path, weights_only=True)", "load_file(path)", "'pickle'"]
)
def test_unsafe_allows(source):
    assert unsafe(source) == []


def test_requirements_repeat_the_dependencies():
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n") == [*PROJECT["dependencies"], ""]


def test_the_version_is_the_packages():
    assert PROJECT["version"] == comfy_tdpo.__version__


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("-", "_") for requirement in requirements}


@pytest.mark.parametrize("path", [path for path in all_sources() if path.parts[0] != "benchmarks"], ids=str)
def test_every_import_is_a_declared_dependency(path):
    declared = distributions(PROJECT["dependencies"])
    if path.parts[0] == "tests":
        declared |= distributions(PROJECT["optional-dependencies"]["test"])
        declared |= {beside.stem for folder in (path.parent, "benchmarks") for beside in (ROOT / folder).glob("*.py")}
    tops = {name.split(".")[0] for name, _ in imported(path, read(path))}
    foreign = tops - sys.stdlib_module_names - COMFYUI - {"comfy_tdpo"}
    assert {DISTRIBUTIONS.get(top, top).lower() for top in foreign} <= declared


def package_folders() -> dict[str, Path]:
    """Every declared package and where it lies, as setuptools finds it: by the longest mapped prefix."""
    folders = {}
    for package in SETUPTOOLS["packages"]:
        prefix = max((p for p in SETUPTOOLS["package-dir"] if f"{package}.".startswith(f"{p}.")), key=len)
        folders[package] = (
            ROOT / SETUPTOOLS["package-dir"][prefix] / package.removeprefix(prefix).strip(".").replace(".", "/")
        )
    return folders


def test_every_package_is_declared():
    on_disk = {(ROOT / path).parent for path in room_sources()}
    assert set(package_folders().values()) == on_disk
    assert {folder / "__init__.py" for folder in on_disk} <= {ROOT / path for path in room_sources()}


def test_every_data_file_is_declared():
    folders = package_folders()
    declared = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folders[package].glob(pattern)
    }
    on_disk = {
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != ".DS_Store"
    }
    assert {str(path.relative_to(ROOT)) for path in on_disk - declared} == set()


def python(code: str, cwd: Path, *flags: str) -> str:
    """What `code` prints in a fresh interpreter, started in `cwd`."""
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_light():
    heavy = python(
        "import sys, comfy_tdpo; print(*{'torch', 'diffusers', 'numpy', 'pydantic'} & set(sys.modules))", ROOT
    )
    assert heavy == ""


# -S leaves out site-packages, so what is installed there, this package perhaps among it, cannot help.
LIBRARY = "import comfy_tdpo, comfy_tdpo.prompts, comfy_tdpo.trainer, comfy_tdpo.nodes as n; print(n.__file__)"


def test_a_bare_checkout_imports_from_its_root():
    assert Path(python(LIBRARY, ROOT, "-S")) == ROOT / "nodes" / "__init__.py"


def test_a_checkout_of_the_librarys_name_imports_from_the_folder_above(tmp_path):
    (tmp_path / "comfy_tdpo").symlink_to(ROOT, target_is_directory=True)
    above = f"{LIBRARY}\nprint(comfy_tdpo.__version__)"
    assert python(above, tmp_path, "-S").split() == [
        str(tmp_path / "comfy_tdpo" / "nodes" / "__init__.py"),
        PROJECT["version"],
    ]


# As ComfyUI does it: the folder's __init__.py under a name of its own.
DOOR = """
import importlib.util, sys
before = list(sys.path)
spec = importlib.util.spec_from_file_location("/custom_nodes/tdpo_x_1", {path!r})
door = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(door)
print(door.WEB_DIRECTORY, door.comfy_entrypoint.__module__, sys.path[: len(before)] == before, sys.path[len(before) :])
"""


@pytest.mark.parametrize(("cwd", "added"), [("elsewhere", [str(ROOT)]), ("root", [])])
def test_comfyuis_door_opens_without_comfyui(tmp_path, cwd, added):
    """The root goes to the end of sys.path, and only where comfy_tdpo cannot be imported without it."""
    door = DOOR.format(path=str(ROOT / "__init__.py"))
    printed = python(door, ROOT if cwd == "root" else tmp_path, "-S")
    assert printed == f"./nodes/web comfy_tdpo.nodes True {added}"
