"""What a user reads who wires in something else, or something damaged."""

from collections.abc import Callable
from types import SimpleNamespace

import comfy.supported_models
import torch
from begin import CPU, PROMPTS, refusal
from kept_otherwise import Coded
from small_models import small_sd2, small_xl
from torch import nn

from comfy_tdpo.nodes.comfy import models_in, sd3_in, shapes_out
from comfy_tdpo.nodes.comfy.decoder import ComfyDecoder
from comfy_tdpo.nodes.runs.prompts import Prompts


class SimpleVAE(SimpleNamespace):
    """A VAE, as far as it is asked before it is refused."""

    def __init__(self, channels: int):
        super().__init__(latent_channels=channels)

    def throw_exception_if_invalid(self) -> None:
        pass


def refusals() -> dict[str, str]:
    """What a user reads who wires in something else."""
    from comfy_tdpo.trainer.config import make_config

    model, clip, vae = shapes_out.shapes_native()
    families = {
        "AuraFlow": comfy.supported_models.AuraFlow({"cond_seq_dim": 2048}),
        **{
            kind: getattr(comfy.supported_models, kind)({"in_channels": 16})
            for kind in ("QwenImage", "Chroma", "PixArtSigma", "WAN21_T2V", "Stable_Cascade_C", "StableAudio")
        },
        "SDXLRefiner": comfy.supported_models.SDXLRefiner(
            {"model_channels": 384, "context_dim": 1280, "adm_in_channels": 2560}
        ),
        "SSD1B": comfy.supported_models.SSD1B(
            {"model_channels": 320, "context_dim": 2048, "adm_in_channels": 2816, "in_channels": 4}
            | {"channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 4, 4]}
            | {"transformer_depth_output": [0, 0, 0, 1, 1, 2, 4, 4, 10], "transformer_depth_middle": -1}
        ),
        "inpainting": comfy.supported_models.SD15({"model_channels": 320, "context_dim": 768, "in_channels": 9}),
    }
    others = {
        name: lambda config=config: models_in.diffusers_unet(
            SimpleNamespace(model=SimpleNamespace(model_config=config))
        )
        for name, config in families.items()
    }
    large = {"depth": 38, "pos_embed_max_size": 192, "qk_norm": "rms"}
    others["SD 3.5 large"] = lambda: sd3_in.transformer_config(
        SimpleNamespace(model=SimpleNamespace(model_config=comfy.supported_models.SD3(large)))
    )
    config = make_config("shapes")
    from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete

    lcm, edm = small_xl(), small_xl()
    (lcm,) = ModelSamplingDiscrete().patch(lcm, "lcm", False)
    (edm,) = ModelSamplingContinuousEDM().patch(edm, "v_prediction", 120.0, 0.002)
    blended = model.clone()
    blended.hook_patches = {object(): {"diffusion_model.out.2.weight": []}}
    wires = {
        "blended": lambda: models_in.Wires(blended, clip, vae).wanted(),
        "another CLIP": lambda: models_in.Wires(small_sd2(), clip, vae).factory(config, Prompts(PROMPTS), CPU),
        "another CLIP for XL": lambda: models_in.Wires(small_xl(), clip, vae).factory(config, Prompts(PROMPTS), CPU),
        "lcm": lambda: models_in.scheduler_of(lcm),
        "EDM": lambda: models_in.scheduler_of(edm),
        "another VAE": lambda: ComfyDecoder(SimpleVAE(16), model),
        "no CLIP": lambda: models_in.Wires(model, None, vae).wanted(),
        "no VAE": lambda: models_in.Wires(model, clip, None).wanted(),
    }
    return {name: refusal(ask) for name, ask in (others | wires).items()}


def broken(network: nn.Module, name: str) -> None:
    """One value of a weight becomes NaN."""
    with torch.no_grad():
        network.get_parameter(name).view(-1)[1] = torch.nan


def damaged() -> dict[str, str]:
    """What a user reads who wires in weights that are NaN, or no numbers."""
    from comfy_tdpo.trainer.config import make_config

    def refused(wire: str = "", name: str = "", change: Callable = lambda *wires: None) -> str:
        model, clip, vae = shapes_out.shapes_native()
        networks = {"MODEL": model.model.diffusion_model, "CLIP": clip.cond_stage_model, "VAE": vae.first_stage_model}
        if name:
            broken(networks[wire], name)
        change(model, networks["MODEL"])
        wires = models_in.Wires(model, clip, vae)
        return refusal(lambda: (wires.wanted(reward=None), wires.factory(make_config("shapes"), Prompts(PROMPTS), CPU)))

    def lora(model, network) -> None:
        change = torch.full_like(network.input_blocks[0][0].weight, torch.nan)
        model.add_patches({"diffusion_model.input_blocks.0.0.weight": ("diff", (change,))})

    def coded(model, network) -> None:
        layer = network.out[2]
        del layer.weight
        layer.weight = nn.Parameter(Coded(torch.zeros(4, 4), 1.0, "TensorCoreNVFP4Layout"), requires_grad=False)

    def bytes_(model, network) -> None:
        network.out[2].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    return {
        "as it is": refused(),
        "NaN in the MODEL": refused("MODEL", "input_blocks.0.0.weight"),
        "NaN in a LoRA": refused(change=lora),
        "NaN in the CLIP": refused("CLIP", "clip_l.transformer.text_model.final_layer_norm.weight"),
        "NaN in the VAE": refused("VAE", "decoder.conv_in.weight"),
        "NaN in the VAE's encoder": refused("VAE", "encoder.conv_in.weight"),
        "quantised": refused(change=coded),
        "integers": refused(change=bytes_),
    }
