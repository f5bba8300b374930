"""The entry point for ComfyUI, which loads this folder as a node pack from custom_nodes."""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).parent
if __name__ == "comfy_tdpo":  # imported from the parent folder, as the checkout is named like the library: act as it
    __path__.insert(0, str(_ROOT / "comfy_tdpo"))
    from .comfy_tdpo import __version__ as __version__
elif importlib.util.find_spec("comfy_tdpo") is None:
    sys.path.append(str(_ROOT))

from comfy_tdpo.nodes import comfy_entrypoint  # noqa: E402

WEB_DIRECTORY = "./nodes/web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
