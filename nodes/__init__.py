"""Node schemas, one file per node; `comfy/` holds all code that uses ComfyUI, `runs/` the graph's view of runs."""

import logging
from typing import Any

from .comfy.needs import missing_names

_log = logging.getLogger(__name__)


async def comfy_entrypoint():
    """The extension that ComfyUI loads. ComfyUI is imported here, so that this package can be imported without it.

    The numbered versions of comfy_api fix nothing that we use: up to ComfyUI 0.10 `comfy_api.v0_0_2` has the same `io`
    and ComfyExtension as `latest`, which core's own nodes import. `comfy/needs.py` says what must not change.
    """
    from comfy_api.latest import ComfyExtension, io

    nodes = _nodes_or_a_line()

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return nodes

    return Extension()


def _nodes_or_a_line() -> list[Any]:
    """The nodes; if ComfyUI lacks something, a line in its log that names it, and the nodes that load without it."""
    missing = missing_names()
    if missing:
        _log.error(
            f"TDPO: this ComfyUI has no {', '.join(missing)}; expected 0.3.64 or a later version that has: update "
            "ComfyUI, or this pack if ComfyUI is newer"
        )
    try:
        return _nodes()
    except (ImportError, AttributeError):
        if not missing:
            raise
        return []


def _nodes() -> list[Any]:
    from .apply_lora import ApplyLoRA
    from .comfy.folders import register_rewards_folder
    from .comfy.routes import register_routes
    from .evaluate import Evaluate
    from .neuron_inspector import NeuronInspector
    from .prompts import Prompts
    from .reward_model import RewardModel
    from .score_images import ScoreImages
    from .shapes_model import ShapesModel
    from .taste import Taste
    from .temporal_critic import TemporalCritic
    from .train import Train

    register_rewards_folder()
    register_routes()
    return [
        RewardModel,
        Taste,
        TemporalCritic,
        Train,
        Evaluate,
        NeuronInspector,
        ApplyLoRA,
        ScoreImages,
        ShapesModel,
        Prompts,
    ]
