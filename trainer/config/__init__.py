"""The configuration of a run: its settings, and how presets, files and flags make it."""

from .layers import make_config, merge, override, presets
from .schema import Fields, OutputConfig, TrainConfig, config_class, leaf_fields, plain_values, validate

__all__ = [
    "Fields",
    "OutputConfig",
    "TrainConfig",
    "config_class",
    "leaf_fields",
    "make_config",
    "merge",
    "override",
    "plain_values",
    "presets",
    "validate",
]
