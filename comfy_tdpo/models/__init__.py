"""Model families: loading, conditioning, denoising, training and export of a kind of model; and their registry.

Shapes: B batch, C H W latent, h w image.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from ..registry import look_up
from ..user_files import user_path
from .files import EXPECTED
from .published import published

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..settings import PolicySettings
    from .conditioning import Conditioning

OF_GRAPH = "comfyui:"  # begins the names of models that only a ComfyUI graph has

# Encodes prompts on the model's device. If it truncates long prompts, it has a method `cut`, see `describe_unread`.
PromptEncoder = Callable[[list[str]], "Conditioning"]


class LatentDecoder(Protocol):
    """Decodes latents to images; each latent element becomes `factor` x `factor` pixels."""

    factor: int

    def __call__(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], float32 (B, 3, h, w), of scaled latents (B, C, H, W), noisy or clean."""
        ...


class Trainable(Protocol):
    """The trained part of a network, and how it is saved.

    network: the module whose forward it changes.
    parameters: by name, the only ones that require gradients; float32, unless settings ask for low precision.
    base: by name, on the CPU, the base model's weights in their place; empty for a LoRA, which is added to them.
    sharded: whether this process has only its own rows of parameters, base and state, see `ShardedWeights`.
    """

    network: nn.Module
    parameters: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    sharded: bool

    def state(self) -> dict[str, Tensor]:
        """The tensors to save in a checkpoint."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; raises ValueError if it belongs to a different model."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block, the network is the frozen base model. If `base` holds weights, entering it copies them."""
        ...

    def export(self, path: Path, metadata: dict[str, str]) -> None:
        """Write a file for use in other tools; `metadata` goes into its header."""
        ...

    def load_exported(self, weights: dict[str, Tensor], strength: float = 1.0) -> None:
        """Load the tensors of such a file with `strength` times their effect, which `export` then writes too.

        Raises ValueError if the file belongs to a different model.
        """
        ...


class DiffusionModel(Protocol):
    """A loaded model of one family, frozen and in evaluation mode.

    source: its name in messages; network: the denoiser; networks: all its networks, by name. The names of those that
        encode prompts begin with text_encoder.
    channels: C; prediction_type: what the network predicts.
    scheduler: its noise schedule, for a process; schedule: (S,) numbers that distinguish that schedule from others.
    process: name of the default process for sampling.
    patch: the sides of a latent are multiples of it, since the network cuts latents into patches; 1 for U-Nets.
    embedded_guidance: the scale of guidance that the network is conditioned on. Only models that were distilled from
        guidance have it; see `set_embedded_guidance`.
    """

    source: str
    network: nn.Module
    networks: dict[str, nn.Module]
    channels: int
    prediction_type: str
    scheduler: Any
    process: str
    patch: int
    encode: PromptEncoder
    decode: LatentDecoder

    @property
    def schedule(self) -> Tensor: ...

    def denoise(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output, (B, C, H, W), without guidance, for latents x_k at the process's times, (B,)."""
        ...

    def adapt(self, settings: PolicySettings, seed: int) -> Trainable:
        """Have the network train what `settings` say, such as a LoRA drawn from `seed`."""
        ...

    def to(self, device: torch.device) -> Self:
        """Move all networks, in place, but those that encode prompts: these are moved when there is a prompt."""
        ...


class Outline(NamedTuple):
    """What the configurations of a model tell without its weights.

    scheduler, process, patch: as in DiffusionModel; factor: as in LatentDecoder.
    configs: a folder with the configurations of its networks, one folder for each; None if they are not known.
    absent: the names of those configured there that this model is without.
    """

    scheduler: Any
    process: str
    factor: int
    patch: int
    configs: Path | None = None
    absent: tuple[str, ...] = ()


class Family(Protocol):
    """Loads models of one kind."""

    def recognizes(self, source: str) -> bool:
        """Whether `source` belongs to this family; cheap, and never raises.

        source: a model as a user names it, or for a hub id, a folder with the index of its pipeline.
        """
        ...

    def outline(self, source: str, prediction_type: str | None) -> Outline:
        """What can be said of the model without its weights; raises ValueError like `load`."""
        ...

    def load(self, source: str, dtype: torch.dtype, prediction_type: str | None) -> DiffusionModel:
        """The model on the CPU with its weights in `dtype`; raises ValueError if it cannot be loaded."""
        ...


# name -> "module:attribute", where the attribute is a Family. The first that recognizes a source loads it. The last one
# accepts every source and raises an error that says what is expected if it cannot load it.
FAMILIES = {
    "shapes-flow": "comfy_tdpo.models.shapes_flow:FAMILY",
    "stable-diffusion-3": "comfy_tdpo.models.stable_diffusion_3:FAMILY",
    "flux": "comfy_tdpo.models.flux:FAMILY",
    "z-image": "comfy_tdpo.models.z_image:FAMILY",
    "stable-diffusion": "comfy_tdpo.models.stable_diffusion:FAMILY",
}


def denoiser_name(model: DiffusionModel) -> str:
    """The denoiser's name among the networks, which is its name in a pipeline of diffusers: "unet" or "transformer"."""
    return next(name for name, network in model.networks.items() if network is model.network)


def is_text_encoder(name: str) -> bool:
    """Whether the network of this name encodes prompts."""
    return name.startswith("text_encoder")


def move_to(device: torch.device, networks: dict[str, nn.Module]) -> None:
    """Move the networks of a model, by name, as `DiffusionModel.to` does."""
    for name, network in networks.items():
        if not is_text_encoder(name):
            network.to(device)


def describe_unread(model: DiffusionModel, prompts: list[str]) -> str:
    """One line for a user about those of `prompts` that the model would truncate; empty if there are none."""
    cut: Callable[[list[str]], str] | None = getattr(model.encode, "cut", None)
    return cut(prompts) if cut else ""


def set_embedded_guidance(model: DiffusionModel, scale: float) -> None:
    """Condition the network on `scale`.

    Raises:
        ValueError: the model takes no guidance.
    """
    if getattr(model, "embedded_guidance", None) is None:
        raise ValueError(
            f"got embedded_guidance {scale:g} for {model.source}, which is not conditioned on guidance; expected none: "
            "remove embedded_guidance, or choose a model that was distilled from guidance, such as FLUX.1 dev"
        )
    model.embedded_guidance = scale  # type: ignore[attr-defined]  # has just been found


def load_model(source: str, dtype: torch.dtype, prediction_type: str | None = None) -> DiffusionModel:
    """Load the model at `source`: a folder, a file or a hub id.

    Args:
        prediction_type: "epsilon", "v_prediction" or "sample", for a model whose configuration lacks it or is wrong.

    Raises:
        ValueError: the model cannot be loaded, or belongs to no family known here.
    """
    return _family(source).load(source, dtype, prediction_type)


def outline(source: str, prediction_type: str | None = None) -> Outline:
    """What the configurations of the model at `source` tell; the same arguments and errors as `load_model`."""
    return _family(source).outline(source, prediction_type)


def _family(source: str) -> Family:
    if known := published(source):
        return look_up(FAMILIES[known.family])
    from .diffusers_folder import index_on_hub, is_hub_id  # imports diffusers

    families: list[Family] = [look_up(place) for place in FAMILIES.values()]
    try:
        is_here = user_path(source).exists()
    except OSError as error:
        raise ValueError(f"got model {source[:80]!r}: {error.strerror}; {EXPECTED}; check the path") from error
    found = index_on_hub(source) if is_hub_id(source) and not is_here else source
    return next(family for family in families if family.recognizes(found))
