"""Stand-ins for what the nodes' schemas take from ComfyUI, so that they can be read where there is none."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

TYPES = ("Boolean", "Clip", "Combo", "Float", "Image", "Int", "LoraModel", "Model", "String", "Vae")


class Socket:
    """An input or an output: `id`, and whatever else it was made with."""

    def __init__(self, id: str, options=None, **more):
        self.id, self.options = id, options
        self.optional, self.default, self.tooltip = (more.get(name) for name in ("optional", "default", "tooltip"))
        self.min, self.max = more.get("min"), more.get("max")
        self.extra_dict: dict = {}


def comfy_type(name: str) -> SimpleNamespace:
    return SimpleNamespace(Input=type(f"{name}Input", (Socket,), {}), Output=type(f"{name}Output", (Socket,), {}))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where the nodes import from, until the test is over."""
    io = SimpleNamespace(
        ComfyNode=object,
        Schema=SimpleNamespace,
        NodeOutput=lambda *values, ui=None: SimpleNamespace(values=values, ui=ui),
        Hidden=SimpleNamespace(unique_id="UNIQUE_ID", extra_pnginfo="EXTRA_PNGINFO", dynprompt="DYNPROMPT"),
        Custom=comfy_type,
        **{name: comfy_type(name) for name in TYPES},
    )
    blocker = {"ExecutionBlocker": lambda message: SimpleNamespace(message=message)}
    management = SimpleNamespace(throw_exception_if_processing_interrupted=lambda: None)
    modules = {"comfy": {"model_management": management}, "comfy_api": {}, "comfy_api.latest": {"io": io}}
    modules |= {"comfy_execution": {}, "comfy_execution.graph_utils": blocker}
    modules["folder_paths"] = {
        "get_filename_list": lambda kind: ["one.safetensors"],
        "get_folder_paths": lambda kind: [],
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("comfy_tdpo.nodes.")]:
        monkeypatch.delitem(sys.modules, name)
