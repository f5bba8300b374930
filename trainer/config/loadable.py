"""Runs whose model only a ComfyUI graph has: it cannot be loaded anywhere else."""

from comfy_tdpo.models import OF_GRAPH

from .schema import TrainConfig


def check_loadable(config: TrainConfig, instead: str) -> None:
    """Raise ValueError for such a run; `instead` says what to do in the graph."""
    if config.model.startswith(OF_GRAPH):
        raise ValueError(
            f"got a run of {config.model!r}, a MODEL that only exists in its ComfyUI graph; expected a model that can "
            f"be loaded: in the graph, {instead}"
        )
