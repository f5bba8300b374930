"""Where ComfyUI keeps what runs make, and how it is told of them."""

from pathlib import Path
from typing import Any

import folder_paths
from server import PromptServer

from .runs import Runs


def all_runs() -> Runs:
    """The runs below ComfyUI's output folder, whose LoRAs go where its own Load LoRA looks."""
    loras, *_ = folder_paths.get_folder_paths("loras")
    return Runs(Path(folder_paths.get_output_directory()).resolve() / "tdpo", Path(loras).resolve())


def tell(detail: dict[str, Any]) -> None:
    """Send an event to every browser, from any thread."""
    PromptServer.instance.send_sync("tdpo.progress", detail)
