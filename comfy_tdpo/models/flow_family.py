"""How the published families of transformers on flow matching are loaded."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from ..process.flow_schedule import PATCH, FlowSchedule
from . import Outline
from .diffusers_folder import check_index, configurations, download, latent_factor, load_parts, local_folder
from .files import read_json, required
from .flow_transformer import FlowTransformer, check_no_prediction
from .model_file import Layout, ModelFile
from .scheduler import flow_schedule_in


class FlowFamily(ABC):
    """A Family that loads a diffusers folder, a hub id, or a .safetensors file.

    pipeline: diffusers' class for the whole model.
    """

    layout: Layout
    pipeline: Any

    @abstractmethod
    def recognizes(self, source: str) -> bool: ...

    @abstractmethod
    def open_file(self, path: Path) -> ModelFile: ...

    @abstractmethod
    def made_of(self, parts: dict[str, Any], schedule: FlowSchedule, source: str) -> FlowTransformer:
        """The model of these components; raises ValueError if they are of different models."""

    @abstractmethod
    def check_transformer(self, config: dict[str, Any], folder: Path) -> None:
        """Raise ValueError if the configuration of the transformer in `folder` is of another model."""

    def outline(self, source: str, prediction_type: str | None) -> Outline:
        check_no_prediction(prediction_type, self.layout.family)
        path = Path(source).expanduser()
        if path.is_file():
            schedule, factor, configs, absent = self.open_file(path).outline()
        else:
            configs, of_schedule = configurations(source, self._classes_in)
            schedule, factor = flow_schedule_in(of_schedule), latent_factor(configs)
            absent = ()
        return Outline(schedule, FlowTransformer.process, factor, PATCH, configs, absent)

    def load(self, source: str, dtype: torch.dtype, prediction_type: str | None) -> FlowTransformer:
        check_no_prediction(prediction_type, self.layout.family)
        path = Path(source).expanduser()
        if path.is_file():
            schedule, parts = self.open_file(path).load(dtype)
        else:
            classes = self._classes_in(local_folder(source))  # before its weights are downloaded
            folder = path if path.is_dir() else download(source, dtype, lambda index: self.pipeline)
            schedule, parts = flow_schedule_in(folder), load_parts(folder, classes, dtype)
        return self.made_of(parts, schedule, source)

    def _classes_in(self, folder: Path) -> dict[str, Any]:
        """The classes of the components in `folder`; raises ValueError if it is of another model."""
        index, optional = required(folder, "model_index.json"), self.layout.optional
        without = all(read_json(index).get(name) in (None, [None, None]) for name in optional)
        classes = {name: cls for name, cls in self.layout.classes.items() if not (without and name in optional)}
        check_index(index, classes)
        self._check_transformer(folder)
        return classes

    def _check_transformer(self, folder: Path) -> None:
        config = folder / "transformer" / "config.json"
        if config.is_file():  # what is missing is named where it is loaded
            self.check_transformer(read_json(config), folder)
