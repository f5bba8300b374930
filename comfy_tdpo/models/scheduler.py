"""The noise schedule that a model was trained on, from its scheduler's configuration."""

from pathlib import Path

from diffusers import DDIMScheduler

from .files import naming, read_json

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def load_scheduler(path: Path, prediction_type: str | None) -> DDIMScheduler:
    """DDIM on the noise schedule in the file `path`. Latents are not in [-1, 1]: never clipped."""
    changes = {"clip_sample": False} | ({"prediction_type": prediction_type} if prediction_type else {})
    config = read_json(path) | changes
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"{path} has prediction_type {kind!r}; expected one of {', '.join(PREDICTION_TYPES)}")
    with naming(path):
        return DDIMScheduler.from_config(config)
