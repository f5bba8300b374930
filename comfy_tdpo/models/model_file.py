"""A model in one .safetensors file, and the diffusers folder that it lies in.

A file takes the place of the folder's transformer, which is never read, and may hold other networks too. What it lacks
is read from the folder. The tokenizers of CLIP come with this package.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..process.flow_schedule import FlowSchedule
from .diffusers_folder import checked_and_filled, empty_network, latent_factor, load_parts
from .names import below_text_model
from .scheduler import flow_schedule_in
from .shipped import clip_tokenizer
from .weights import Weights, converting

_TRANSFORMER = "transformer"


class Part(NamedTuple):
    """A network that a file may hold.

    begins: what the names of its weights begin with.
    read: gives weights, under their names without a `begins` that is alone, the names of the empty network.
    """

    begins: tuple[str, ...]
    read: Callable[[dict[str, Tensor], Any], dict[str, Tensor]]


def _weight_shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in network.named_parameters()}


def text_encoder(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    rename = below_text_model(network)
    return {rename(name): weight for name, weight in weights.items()}


def autoencoder(weights: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    return convert_ldm_vae_checkpoint(weights, network.config)


@dataclass(frozen=True)
class Layout:
    """The components of a family, by their names in a diffusers folder, and where a file has them.

    family: its name in messages.
    classes: of all components but the scheduler.
    parts: the networks that a file may hold; each holds the transformer.
    downloads: the hub ids of such folders, in messages.
    optional: components that may be missing, all together; the first is the network.
    scheduler: whether a file needs the scheduler beside it, since files of one layout differ in it.
    otherwise: what else to do about a missing component, in messages.
    """

    family: str
    classes: dict[str, Any]
    parts: dict[str, Part]
    downloads: str
    optional: tuple[str, ...] = ()
    scheduler: bool = False
    otherwise: str = ""


@dataclass(frozen=True)
class ModelFile:
    """A file of the family with this `layout`.

    weights: the transformer's are named without a prefix.
    configs: the shipped configurations of its model.
    networks: empty ones, by name, for those whose size the file tells, which may not be that of the configurations.
    """

    layout: Layout
    weights: Weights
    configs: Path
    networks: dict[str, nn.Module] = field(default_factory=dict)

    def outline(self) -> tuple[FlowSchedule, int, Path | None, tuple[str, ...]]:
        """Its noise schedule, its pixels for each element of a latent, its configurations, or None if a network has
        other sizes than these say, and the components that it is without.

        Raises:
            ValueError: a component is missing.
        """
        self._beside()
        with torch.device("meta"):
            published = {name: empty_network(self.configs / name, self.layout.classes[name]) for name in self.networks}
        usual = all(
            _weight_shapes(network) == _weight_shapes(self.networks[name]) for name, network in published.items()
        )
        return self._schedule(), latent_factor(self.configs), self.configs if usual else None, self._absent()

    def load(self, dtype: torch.dtype) -> tuple[FlowSchedule, dict[str, Any]]:
        """Its noise schedule, and its components, named as in a diffusers folder.

        Raises:
            ValueError: a component is missing, or does not fit.
        """
        classes, beside, schedule = self.layout.classes, self._beside(), self._schedule()
        networks = self.networks | {
            name: empty_network(self.configs / name, classes[name])
            for name in self._inside()
            if name not in self.networks
        }
        parts = load_parts(self._folder, {name: classes[name] for name in beside}, dtype, networks)
        for name, network in networks.items():
            parts[name] = checked_and_filled(network, self._read(name, network, dtype), dtype, self.weights.source)
        for name in self._shipped():
            parts[name] = clip_tokenizer(self.configs, name)
        return schedule, parts

    @property
    def _folder(self) -> Path:
        return self.weights.source.parent

    def _schedule(self) -> FlowSchedule:
        return flow_schedule_in(self._folder if self.layout.scheduler else self.configs)

    def _inside(self) -> list[str]:
        parts, names = self.layout.parts, self.weights.names
        return [
            part
            for part, (begins, _) in parts.items()
            if part == _TRANSFORMER or any(name.startswith(begins) for name in names)
        ]

    def _shipped(self) -> list[str]:
        return [name for name, cls in self.layout.classes.items() if cls is CLIPTokenizer]

    def _absent(self) -> tuple[str, ...]:
        """The optional components that neither the file nor its folder has."""
        optional = self.layout.optional
        present = optional and (optional[0] in self._inside() or (self._folder / optional[0]).is_dir())
        return () if present else optional

    def _beside(self) -> list[str]:
        """The components that are read from the folder, without the scheduler."""
        layout, inside = self.layout, self._inside()
        known = {*inside, *self._shipped(), *self._absent()}
        beside = [name for name in layout.classes if name not in known]
        needed = [*beside, "scheduler"] if layout.scheduler else beside
        if missing := [name for name in needed if not (self._folder / name).is_dir()]:
            raise ValueError(
                f"{self.weights.source} has {', '.join(inside)} of {layout.family}, and neither the file nor its "
                f"folder has {', '.join(missing)}; expected the file to lie in a diffusers folder of {layout.family}, "
                f"whose own transformer is not needed: move it into a download of {layout.downloads}{layout.otherwise}"
            )
        return beside

    def _read(self, part: str, network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of a part that is in the file, under the names of `network`."""
        begins, read = self.layout.parts[part]
        prefix = begins[0] if len(begins) == 1 else ""
        found = {name.removeprefix(prefix): weight for name, weight in self.weights.read(begins, dtype).items()}
        with converting(self.weights.source):
            return read(found, network)
