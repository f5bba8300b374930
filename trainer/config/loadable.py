"""Runs whose model only a ComfyUI graph has: it cannot be loaded anywhere else."""

from comfy_tdpo.models import OF_GRAPH

from .schema import TrainConfig


def check_loadable(config: TrainConfig, instead: str) -> None:
    """Raise ValueError for such a run; `instead` says what to do in the graph."""
    if config.model.startswith(OF_GRAPH):
        raise ValueError(
            f"got the model {config.model!r}, which exists only in its ComfyUI graph; expected one that can be loaded "
            f"from disk. In that graph, {instead}"
        )
