"""LoRAs as ComfyUI applies them, and as we do."""

from functools import cache, partial
from pathlib import Path

import comfy.lora_convert
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from begin import PROMPTS, difference, drawn, patched_in
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from comfy_tdpo.models.components import load_components
from comfy_tdpo.models.stable_diffusion import ClipText
from comfy_tdpo.nodes.comfy import models_in, shapes_out
from comfy_tdpo.shapes import WORLD


def _by_comfyui(patched, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """What a patched MODEL predicts."""
    with patched_in(patched) as inner:
        return inner.diffusion_model(latents, timesteps, context=context)


def lora(file: str) -> dict[str, float]:
    """What Shapes predicts with the LoRA on, by whoever applies it."""
    from comfy_tdpo.nodes.comfy.lora import apply_weights
    from comfy_tdpo.trainer.run.loras import read_lora

    model, _, _ = shapes_out.shapes_native()
    parts = load_components(str(WORLD / "pipeline"))
    latents, timesteps = drawn(2, 4, 8, 8), torch.tensor([10, 700])
    context = ClipText(parts.tokenizer, parts.text_encoder)(PROMPTS).parts["states"]

    by_comfyui = partial(_by_comfyui, latents=latents, timesteps=timesteps, context=context)
    plain = by_comfyui(model.clone())
    loaded, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(file), 1.0, 0)
    ours = apply_weights(model, read_lora(Path(file)), 1.0, "test")
    expected = by_comfyui(loaded)
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name)
    return {
        "Apply": difference(by_comfyui(ours), expected),
        "diffusers": difference(pipeline.unet(latents, timesteps, context).sample, expected),
        "baked in": difference(models_in.diffusers_unet(ours)(latents, timesteps, context).sample, expected),
        "what it changes": difference(plain, expected),
        "names differ": float(models_in.model_name(ours) != models_in.model_name(model)),
        "names repeat": float(models_in.model_name(ours) == models_in.model_name(apply_again(model, file))),
    }


def whole(file: str) -> dict[str, float]:
    """What Shapes predicts with all weights trained: as a patch on its MODEL at two strengths, and by diffusers; and
    what Save Checkpoint writes of that MODEL."""
    from comfy_tdpo.nodes.comfy.whole import apply_model
    from comfy_tdpo.trainer.run.loras import read_lora

    model, clip, vae = shapes_out.shapes_native()
    parts, weights = load_components(str(WORLD / "pipeline")), read_lora(Path(file))
    latents, timesteps = drawn(2, 4, 8, 8), torch.tensor([10, 700])
    context = ClipText(parts.tokenizer, parts.text_encoder)(PROMPTS).parts["states"]

    by_comfyui = partial(_by_comfyui, latents=latents, timesteps=timesteps, context=context)
    base = {name: weight.clone() for name, weight in parts.unet.state_dict().items()}
    found: dict[str, float] = {}
    plain = by_comfyui(model.clone())
    for strength in (1.0, 0.5):
        patched = apply_model(model, weights, strength, "test")
        parts.unet.load_state_dict({name: torch.lerp(base[name], weights[name], strength) for name in base})
        expected = parts.unet(latents, timesteps, context).sample
        found[f"Apply at {strength:g}"] = difference(by_comfyui(patched), expected)
        found[f"baked in at {strength:g}"] = difference(
            models_in.diffusers_unet(patched)(latents, timesteps, context).sample, expected
        )
    found["what it changes"] = difference(plain, expected)
    found["the MODEL afterwards"] = difference(by_comfyui(model.clone()), plain)
    try:
        apply_model(model, {"conv_in.weight": torch.zeros(1, 4, 3, 3)}, 1.0, "run 'other'")
    except ValueError as error:
        found["refused"] = float("run 'other', which do not fit this MODEL: conv_in.weight" in str(error))
    return found | checkpoint(apply_model(model, weights, 1.0, "test"), clip, vae, weights)


def checkpoint(patched, clip, vae, weights: dict[str, Tensor]) -> dict[str, float]:
    """How far the U-Net in the file that core's Save Checkpoint writes is from the trained `weights`."""
    try:
        from comfy_extras.nodes_model_merging import CheckpointSave
    except ModuleNotFoundError:  # the fork's own place
        from comfy_extras.nodes.nodes_model_merging import CheckpointSave

    CheckpointSave().save(patched, clip, vae, "checkpoints/whole")
    (path,) = Path(folder_paths.get_output_directory()).rglob("whole_*.safetensors")
    prefix, names = "model.diffusion_model.", comfy.utils.unet_to_diffusers(patched.model.model_config.unet_config)
    stored = {name: weight for name, weight in load_file(path).items() if name.startswith(prefix)}
    return {
        "a checkpoint's U-Net": max(difference(stored[prefix + names[name]], weights[name]) for name in weights),
        "its other weights": len(stored) - len(weights),
    }


def baked(snapshot: str, file: str, strength: str) -> dict[str, float]:
    """How far a FILE in ComfyUI's own Load LoRA at 1 is from the SNAPSHOT at the STRENGTH baked into it."""
    from nodes import LoraLoader

    model, _, _ = shapes_out.shapes_native()
    parts = load_components(str(WORLD / "pipeline"))
    latents, timesteps = drawn(2, 4, 8, 8), torch.tensor([10, 700])
    context = ClipText(parts.tokenizer, parts.text_encoder)(PROMPTS).parts["states"]

    def by_load_lora(name: str, strength: float) -> Tensor:
        folder_paths.folder_names_and_paths["loras"] = ([str(Path(name).parent)], {".safetensors"})
        patched, _ = LoraLoader().load_lora(model, None, Path(name).name, strength, 0)
        return _by_comfyui(patched, latents, timesteps, context)

    expected = by_load_lora(snapshot, float(strength))
    return {
        "Load LoRA": difference(by_load_lora(file, 1.0), expected),
        "what strength changes": difference(by_load_lora(snapshot, 1.0), expected),
    }


def blended(file: str) -> dict[str, float]:
    """How far each step of a sampling is from the LoRA at the strength that its schedule says, and from the base."""
    import comfy.sample

    from comfy_tdpo.nodes.comfy.lora import apply_weights
    from comfy_tdpo.trainer.run.loras import read_lora

    model, clip, _ = shapes_out.shapes_native()
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPTS[0], ""))
    context = positive[0][0]
    weights, steps = read_lora(Path(file)), 10

    passes: list[int] = []

    def run(network, given: dict) -> Tensor:
        passes.append(len(given["input"]))
        return network(given["input"], given["timestep"], **given["c"])

    def sample(patched) -> tuple[list[dict], Tensor]:
        seen: list[dict] = []
        passes.clear()
        patched = patched.clone()
        patched.set_model_sampler_post_cfg_function(lambda args: (seen.append(dict(args)), args["denoised"])[1])
        patched.set_model_unet_function_wrapper(run)
        latent = torch.zeros(1, 4, 8, 8)
        settings = ("ddim", "simple", positive, negative, latent)
        result = comfy.sample.sample(patched, drawn(1, 4, 8, 8), steps, 3.0, *settings, disable_pbar=True, seed=1)
        comfy.model_management.unload_all_models()  # what is loaded is patched no further
        return seen, result

    @cache
    def predicted(schedule: str, k: int, strength: float) -> Tensor:
        """What the model with the LoRA at that strength makes of a step's latent, by the weights."""
        step = seen[schedule][k]
        patched = apply_weights(model, weights, strength, "test")
        with patched_in(patched) as inner:
            return inner.apply_model(step["input"], step["sigma"], c_crossattn=context)

    found: dict[str, float] = {}
    shares = {
        "linear": lambda k: k / steps,
        "power_2": lambda k: (k / steps) ** 2,
        "step_0.6": lambda k: k >= 6,
        "until_0.5": lambda k: k < 5,
    }
    seen: dict[str, list[dict]] = {}
    seen["none"], base = sample(model)
    for schedule, share in shares.items():
        seen[schedule], _ = sample(apply_weights(model, weights, 0.8, "test", schedule))
        found[f"{schedule}, passes"] = len(passes)
        first, of_base = (seen[name][0]["denoised"] for name in (schedule, "none"))
        found[f"{schedule}, first step is the base's"] = difference(first, of_base)
        for k in range(steps):
            # the schedule moves on in hundredths, and the times of the steps are whole numbers out of 1000
            low, strength, high = (0.8 * share(min(max(k + slack, 0), steps)) for slack in (-0.15, 0, 0.15))
            right = predicted(schedule, k, strength)
            tolerance = max(difference(predicted(schedule, k, around), right) for around in (low, high))
            found[f"{schedule}, step {k}"] = difference(seen[schedule][k]["cond_denoised"], right) - tolerance
    far = [difference(predicted("none", k, 0.0), predicted("none", k, 0.8)) for k in range(steps)]
    found["difference of base and tuned"] = max(far)
    found["the MODEL afterwards"] = difference(sample(model)[1], base)
    return found


def apply_again(model, file: str):
    patched, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(file), 1.0, 0)
    return patched
