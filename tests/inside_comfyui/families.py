"""What is alike in all families of published models: how far ComfyUI's networks and LoRAs are from ours, and a job."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.samplers
import comfy.sd
import torch
from begin import difference, patched_in
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from small_models import trained
from torch import Tensor

from comfy_tdpo.models import DiffusionModel
from comfy_tdpo.nodes.comfy import models_in, shapes_out
from comfy_tdpo.process.flow import noise_levels
from comfy_tdpo.process.flow_schedule import FlowSchedule
from comfy_tdpo.settings import PolicySettings

LORA = PolicySettings(rank=4, alpha=2.0, targets="attention+feed-forward")


class EightPixels:
    factor = 8


def with_and_without_lora(
    model: Any,
    native: Callable[[Any], Tensor],
    convert: Callable[[Any], Any],
    made: Callable[[Any], DiffusionModel],
    inputs: tuple,
    pipeline: Callable[[Any], Any],
    change: float = 0.1,
) -> dict[str, float]:
    """How far the network is from ComfyUI's, and the same with a LoRA on it, in ComfyUI, in diffusers and baked in.

    native: what the network inside a MODEL predicts; convert: gives a network of diffusers from a MODEL.
    made: our model around such a network; inputs: what it is given for the same prediction.
    pipeline: diffusers' around a network alone; change: the deviation of the LoRA's weights B.
    """

    def by_comfyui(patched: Any) -> Tensor:
        with patched_in(patched) as inner:
            return native(inner)

    def by_us(network: Any) -> Tensor:
        return made(network).denoise(*inputs)

    network = convert(model)
    ours, plain = made(network), by_comfyui(model.clone())
    found = {"network from native": difference(by_us(network), plain), "scale of the output": plain.abs().max().item()}
    lora, generator = ours.adapt(LORA, seed=0), torch.Generator().manual_seed(0)
    for name, parameter in lora.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(0, change, generator=generator)
    expected, state = by_us(network), lora.file_state()
    patched, _ = comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0)
    modules = len(lora.parameters) / 2
    found["modules of the LoRA that ComfyUI leaves out"] = modules - sum(map(len, patched.patches.values()))
    found["LoRA in ComfyUI"] = difference(by_comfyui(patched), expected)
    found["what the LoRA changes"] = difference(expected, plain)
    found["LoRA baked in"] = difference(by_us(convert(patched)), expected)
    again = convert(model)
    with TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "lora.safetensors")
        pipeline(again).load_lora_weights(folder, weight_name="lora.safetensors")
    found["LoRA in diffusers"] = difference(by_us(again), expected)
    return found


def node(name: str) -> Any:
    """One of ComfyUI's nodes that change the noise levels of a MODEL."""
    try:
        from comfy_extras import nodes_model_advanced
    except ImportError:  # the fork's own place
        from comfy_extras.nodes import nodes_model_advanced
    return getattr(nodes_model_advanced, name)()


def off_levels(model: Any, schedule: FlowSchedule) -> float:
    """How far the noise levels are from those of ComfyUI's simple scheduler."""
    theirs = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 10)
    return difference(theirs[:-1].double(), noise_levels(schedule, 10)[0])


def native_vae(channels: int = 4) -> comfy.sd.VAE:
    vae = shapes_out._native_vae(_small_vae(channels))
    vae.latent_channels = channels
    return vae


def _small_vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=64,
    ).eval()


def job(model, clip, vae, steps: int = 2, resolution: str = "64x96") -> dict:
    """How a run of the preset that a node takes for this MODEL ends, but for its size."""
    from comfy_tdpo.nodes.runs.reward_choice import RewardChoice

    wires = models_in.Wires(model, clip, vae)
    small = f'precision = "fp32"\nguards = []\nresolution = "{resolution}"\noutput.grid_images = 2'
    numbers = {"epochs": 1, "samples_per_epoch": 4}
    wanted = wires.wanted(
        reward=RewardChoice({"shapes-aesthetic": 1.0}), numbers=numbers, settings=small, prompt_set="shapes"
    )
    preset = wanted.config()
    config = preset.model_copy(update={"steps": steps})
    with TemporaryDirectory() as folder:
        return trained(wires, config, Path(folder) / "run") | {"preset's steps": preset.steps}
