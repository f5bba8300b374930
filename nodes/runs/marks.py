"""Which Train node a run belongs to, in a file of the run's folder."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from comfy_tdpo.atomic_files import write_atomically

from ...trainer.run import RunFolder

MARK = "comfyui.json"


@dataclass(frozen=True)
class Place:
    """node: the unique id of a Train node; workflow: the id of the workflow it is in, None if that has none."""

    node: str
    workflow: str | None = None


@dataclass(frozen=True)
class Mark:
    """Where the run was last started, None for a run of the command line.

    wait: whether that graph waits for its end; because: why the run has its name, or empty; unheeded: what was queued
    with other settings while it trained, or empty; widgets: the values of the node's that decide which run it means.
    """

    node: str | None = None
    workflow: str | None = None
    wait: bool = False
    because: str = ""
    unheeded: str = ""
    widgets: dict[str, Any] = field(default_factory=dict)


def workflow_id(extra_pnginfo: Any) -> str | None:
    """The id of the workflow that a prompt was made of, from what the frontend sends to be saved in images."""
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    found = workflow.get("id") if isinstance(workflow, dict) else None
    return found if isinstance(found, str) else None


def mark(run: RunFolder, place: Place, wait: bool, because: str, widgets: dict[str, Any] | None = None) -> None:
    _write(run, Mark(place.node, place.workflow, wait, because, widgets=widgets or {}))


def mark_unheeded(run: RunFolder, changes: str) -> None:
    """Note what the settings queued last would change in the run, which trains on with those it was started with."""
    before = mark_of(run)
    if changes != before.unheeded:
        _write(run, replace(before, unheeded=changes))


def _write(run: RunFolder, made: Mark) -> None:
    text = json.dumps(asdict(made))
    write_atomically(run.path / MARK, lambda file: file.write_text(text, encoding="utf-8"))


def mark_of(run: RunFolder) -> Mark:
    """The run's mark; an empty one if it has none, or one that somebody edited."""
    try:
        found: Any = json.loads((run.path / MARK).read_text(encoding="utf-8"))
        because, unheeded = (str(found.get(name, "")) for name in ("because", "unheeded"))
        widgets = dict(found.get("widgets", {}))
        wait, workflow = found.get("wait") is True, found.get("workflow")
        return Mark(str(found["node"]), workflow, wait, because, unheeded, widgets)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Mark()
