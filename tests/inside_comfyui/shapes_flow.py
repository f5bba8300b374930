"""The flow model of Shapes as it lies on disk, as native models, and back."""

import comfy.sample
import torch
from begin import CPU, PROMPTS, difference, drawn
from families import job
from sd3 import network

from comfy_tdpo.models import load_model
from comfy_tdpo.nodes.comfy import models_in, sd3_in, shapes_out
from comfy_tdpo.nodes.comfy.encoded import EncodedPrompts
from comfy_tdpo.process.flow import make_flow_ddim
from comfy_tdpo.shapes import MODELS

STEPS, GUIDANCE = 10, 3.0


def shapes_flow() -> dict:
    ours = load_model(str(MODELS["shapes-flow"]), torch.float32)
    model, clip, vae = shapes_out.shapes_native("shapes-flow")
    expected = ours.encode(PROMPTS)
    encode = EncodedPrompts(clip, {prompt: prompt for prompt in PROMPTS}, CPU, pooled=True, joint=True)
    encoded, latents, times = encode(PROMPTS), drawn(2, 4, 8, 8), torch.tensor([10.0, 700.0])
    states, pooled = (expected.parts[part] for part in ("states", "pooled"))
    native = model.model.diffusion_model(latents, times, context=states, y=pooled)
    found = {part: difference(encoded.parts[part], expected.parts[part]) for part in ("states", "pooled")}
    return found | {
        "native transformer": difference(native, ours.denoise(latents, times, expected)),
        "shift": sd3_in.flow_schedule(model).shift,
        "drawn by ComfyUI": difference(drawn_by_comfyui(model, encode), drawn_by_us(ours)),
        "networks": {"Shapes": network(model, expected, latents)},
        "preset": models_in.Wires(model, clip, vae).wanted(reward=None).preset,
        "job": job(model, clip, vae, steps=3, resolution="64"),
    }


def drawn_by_comfyui(model, encode: EncodedPrompts) -> torch.Tensor:
    """What its own sampler makes of noise by Euler's method: the latent as the network has it."""
    rows = (encode([text]).parts for text in (PROMPTS[0], ""))
    prompt, nothing = ([[parts["states"], {"pooled_output": parts["pooled"]}]] for parts in rows)
    noise = drawn(1, 4, 8, 8)
    sampling = {"sampler_name": "euler", "scheduler": "simple", "positive": prompt, "negative": nothing}
    ended = comfy.sample.sample(
        model, noise, STEPS, GUIDANCE, **sampling, latent_image=torch.zeros_like(noise), disable_pbar=True, seed=0
    )
    return model.model.process_latent_in(ended)


def drawn_by_us(ours) -> torch.Tensor:
    process = make_flow_ddim(ours.scheduler, STEPS, eta=0.0)
    latents = drawn(1, 4, 8, 8)
    for k in range(STEPS):
        uncond, cond = (
            ours.denoise(latents, process.times[k].expand(1), ours.encode([prompt])) for prompt in ("", PROMPTS[0])
        )
        latents = process.step(uncond + GUIDANCE * (cond - uncond), latents, torch.tensor([k])).mean
    return latents
