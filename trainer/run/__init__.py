"""A run on disk: its folder, what lies in it, and exact state to resume from."""

from .folder import EpochMetrics, RunFolder, TrainingError

__all__ = ["EpochMetrics", "RunFolder", "TrainingError"]
