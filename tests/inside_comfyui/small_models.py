"""MODELs, decoders and the training thread: how far ComfyUI's are from ours."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import torch
from begin import CPU, PROMPTS, difference, drawn
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from comfy_tdpo.models.components import load_components
from comfy_tdpo.models.shipped import CONFIGS
from comfy_tdpo.models.stable_diffusion import Autoencoder, ClipText
from comfy_tdpo.nodes.comfy import models_in, shapes_out
from comfy_tdpo.nodes.comfy.decoder import ComfyDecoder
from comfy_tdpo.nodes.comfy.encoded import EncodedPrompts
from comfy_tdpo.nodes.runs.prompts import Prompts
from comfy_tdpo.shapes import WORLD


def shapes() -> dict[str, float]:
    """The world of Shapes as it lies on disk, as native models, and back."""
    ours = load_components(str(WORLD / "pipeline"))
    model, clip, vae = shapes_out.shapes_native()
    latents, timesteps = drawn(2, 4, 8, 8), torch.tensor([10, 700])
    embeds = ClipText(ours.tokenizer, ours.text_encoder)(PROMPTS).parts["states"]
    expected = ours.unet(latents, timesteps, embeds).sample
    encoded = EncodedPrompts(clip, {prompt: prompt for prompt in PROMPTS}, CPU)
    decoder = ComfyDecoder(vae, model)
    images = Autoencoder(ours.vae)(latents)
    return {
        "text": difference(encoded(PROMPTS).parts["states"], embeds),
        "native unet": difference(model.model.diffusion_model(latents, timesteps, context=embeds), expected),
        "unet from native": difference(models_in.diffusers_unet(model)(latents, timesteps, embeds).sample, expected),
        "decoder": difference(decoder(latents), images),
        "native vae": difference(vae.decode(model.model.process_latent_out(latents)).permute(0, 3, 1, 2), images),
        "alpha_bar": difference(models_in.scheduler_of(model).alphas_cumprod, ours.scheduler.alphas_cumprod),
        "scale of the output": expected.abs().max().item(),
    }


def decoders() -> dict[str, float]:
    """How far our copies of VAEs are from ComfyUI's decoding, where nothing of ComfyUI may be asked by them."""
    model, _, vae = shapes_out.shapes_native()
    half = copy.copy(vae)
    half.first_stage_model, half.vae_dtype = copy.deepcopy(vae.first_stage_model).bfloat16(), torch.bfloat16
    tiny = comfy.taesd.taesd.TAESD()
    draw_weights(tiny)
    small = comfy.sd.VAE(sd=tiny.state_dict(), dtype=torch.float32)
    latents, found = drawn(2, 4, 8, 8), {}
    for name, native in (("KL", vae), ("KL in bf16", half), ("TAESD", small)):
        expected = native.process_output(
            native.first_stage_model.decode(model.model.latent_format.process_out(latents).to(native.vae_dtype)).float()
        )
        decoder = ComfyDecoder(native, model)
        layers = [kind for kind in map(type, decoder.network.modules()) if kind.__module__ == "comfy.ops"]
        with nothing_asked():
            found[name] = difference(decoder(latents), expected)
        found[f"{name}, layers of ComfyUI"] = len(layers)
        found[f"{name}, varies by"] = expected.std().item()
    return found


def thread() -> dict[str, str | None]:
    """How a job ends that trains, measures and recommends while nothing of ComfyUI may be asked."""
    from comfy_tdpo.trainer.config import make_config

    small = {"epochs": 1, "samples_per_epoch": 4, "samples_per_update": 2, "steps": 2}
    config = make_config("shapes", overrides=small | {"output": {"grid_images": 2, "recommend": True}})
    with TemporaryDirectory() as folder:
        ended = trained(models_in.Wires(*shapes_out.shapes_native()), config, Path(folder) / "run")
        return ended | {"table": str((Path(folder) / "run" / "recommendation").is_dir())}


def trained(wires: models_in.Wires, config, path: Path) -> dict[str, str | None]:
    """How a job with these wires ends, while nothing of ComfyUI may be asked."""
    from comfy_tdpo.prompts import load_prompts
    from comfy_tdpo.trainer.job import Job
    from comfy_tdpo.trainer.run import RunFolder

    factory = wires.factory(config, Prompts(load_prompts(config.prompts)), CPU)
    with nothing_asked():
        run = RunFolder(path)
        run.create(config)
        job = Job(run, factory, CPU)
        job.start()
        status = job.wait()
        return {"state": status.state, "error": status.error}


@contextmanager
def nothing_asked() -> Iterator[None]:
    """Meanwhile, every function of ComfyUI's memory management and of its layers raises an error."""

    def refuse(*_, **__):
        raise AssertionError("the training thread asked ComfyUI")

    kept = []
    for module in (comfy.model_management, comfy.ops):
        for name, value in vars(module).items():
            if isinstance(value, FunctionType):
                kept.append((module, name, value))
    layers = [kind for kind in vars(comfy.ops.disable_weight_init).values() if isinstance(kind, type)]
    kept += [(kind, "forward", vars(kind)["forward"]) for kind in layers if "forward" in vars(kind)]
    for owner, name, _ in kept:
        setattr(owner, name, refuse)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


# --- families, with random weights


class SmallSD2(comfy.supported_models.SD20):
    """Stable Diffusion 2.1's layout, narrower, which predicts v."""

    unet_config: dict = {}

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION


def sd2() -> dict[str, float]:
    """The layout of 2.x: linear projections, heads of 64 channels, v-prediction."""
    model = small_sd2()
    assert models_in.scheduler_of(model).config.prediction_type == "v_prediction"
    return both_ways(model, models_in.diffusers_unet(model), drawn(2, 4, 16, 16), drawn(2, 7, 48))


def small_sd2(quantised: bool = False) -> comfy.model_patcher.ModelPatcher:
    depths = [1, 1, 1, 0]
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "num_res_blocks": [2] * 4,
        "channel_mult": [1, 2, 2, 2],
        "transformer_depth": [depth for depth in depths for _ in range(2)],
        "transformer_depth_output": [depth for depth in depths for _ in range(3)],
        "transformer_depth_middle": 1,
        "context_dim": 48,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "num_heads": -1,
        "num_head_channels": 64,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }
    family = SmallSD2(config)
    family.set_inference_dtype(torch.float32, torch.float32 if quantised else None)
    if quantised:  # as ComfyUI marks a family whose file is in scaled float8, until 0.3.65 and since
        family.scaled_fp8, family.quant_config = torch.float8_e4m3fn, {"mixed_ops": True}
    base = family.get_model({})
    draw_weights(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def small_xl() -> comfy.model_patcher.ModelPatcher:
    """With 80 channels of text, 48 of them pooled."""
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 2],
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": 2,
        "context_dim": 32 + 48,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "num_heads": -1,
        "num_head_channels": 64,
        "num_classes": "sequential",
        "adm_in_channels": 48 + 6 * 256,
        "use_temporal_attention": False,
        "legacy": False,
    }
    return small(comfy.supported_models.SDXL, config)


def sd1() -> dict[str, float]:
    """The published shape of 1.5, read by ComfyUI's own reader of diffusers' U-Nets."""
    config = json.loads((CONFIGS / "sd1" / "unet" / "config.json").read_text())
    ours = UNet2DConditionModel(**config)
    draw_weights(ours)
    model = comfy.sd.load_diffusion_model_state_dict(dict(ours.state_dict()))
    latents, context = drawn(1, 4, 8, 8), drawn(1, 77, 768)
    expected = ours(latents, torch.tensor([700]), context).sample
    del ours
    converted = models_in.diffusers_unet(model)
    found = both_ways(model, converted, latents, context)
    again = converted(latents, torch.tensor([700]), context).sample
    return found | {"as it was before ComfyUI": difference(again, expected)}


def small(kind: type, config: dict) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of the family `kind` of ComfyUI, of other sizes than its own, with random weights."""
    family = type(f"Small{kind.__name__}", (kind,), {"unet_config": {}})(config)
    family.set_inference_dtype(torch.float32, None)
    base = family.get_model({})
    draw_weights(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def draw_weights(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        weight.data = scale * torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1 and name.endswith("weight"):  # of a norm
            weight.data += 1


def both_ways(model, unet: UNet2DConditionModel, latents: Tensor, context: Tensor) -> dict[str, float]:
    timesteps = torch.tensor([10, 700])[-len(latents) :]
    expected = model.model.diffusion_model(latents, timesteps, context=context)
    got = unet(latents, timesteps, context).sample
    return {"unet from native": difference(got, expected), "scale of the output": expected.abs().max().item()}
