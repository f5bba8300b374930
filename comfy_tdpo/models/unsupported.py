"""Families that cannot be trained here: by what they are recognised, and which supported model is nearest to each.

Cheap: imports no torch.
"""

from collections.abc import Collection
from typing import NamedTuple

SD15, XL, SD35 = "Stable Diffusion 1.5", "Stable Diffusion XL", "Stable Diffusion 3.5 medium"
FLUX, Z_IMAGE = "FLUX.1", "Z-Image"
VIDEO = "none for video; for images, " + SD35
EDM = "Playground 2.5 or CosXL, with the noise levels of EDM"


class Other(NamedTuple):
    """A family that is not supported.

    classes: what the names of its classes begin with, of pipelines in diffusers and of models in ComfyUI, without "_".
    keys: parts of the names of weights that only its files have.
    """

    name: str
    nearest: str
    classes: tuple[str, ...]
    keys: tuple[str, ...] = ()


# The first that fits counts: those that share names with others come before these.
_OTHERS = (
    Other("Flux 2", FLUX, ("Flux2",), ("double_stream_modulation_img.",)),
    Other("Chroma", FLUX, ("Chroma",), ("distilled_guidance_layer.",)),
    Other(
        "HunyuanImage or HunyuanVideo", SD35, ("HunyuanImage", "HunyuanVideo"), ("txt_in.individual_token_refiner.",)
    ),
    Other("Qwen-Image", SD35, ("QwenImage",), (".img_mod.1.",)),
    Other("Lumina", Z_IMAGE, ("Lumina",), ("noise_refiner.",)),
    Other("HiDream", SD35, ("HiDream",), ("caption_projection.0.linear.",)),
    Other("PixArt", SD35, ("PixArt",), ("t_block.1.",)),
    Other("Sana", SD35, ("Sana",)),
    Other("Hunyuan-DiT", SD35, ("HunyuanDiT",), ("mlp_t5.0.",)),
    Other("AuraFlow", SD35, ("AuraFlow",), ("double_layers.0.attn.w1q.",)),
    Other("OmniGen", SD35, ("OmniGen", "Omnigen")),
    Other("CogView", SD35, ("CogView",)),
    Other("Stable Cascade", XL, ("StableCascade", "Wuerstchen"), ("clip_txt_mapper.", "clip_mapper.")),
    Other("Kolors", XL, ("Kolors",)),
    Other("Kandinsky", XL, ("Kandinsky",)),
    Other("DeepFloyd IF", XL, ("IF",)),
    Other("Wan", VIDEO, ("Wan", "WAN"), ("head.modulation",)),
    Other("LTX-Video", VIDEO, ("LTX",), ("adaln_single.emb.timestep_embedder.",)),
    Other("Cosmos", VIDEO, ("Cosmos",)),
    Other("Mochi", VIDEO, ("Mochi", "GenmoMochi")),
    Other("CogVideoX", VIDEO, ("CogVideoX",)),
    Other("Stable Video Diffusion", VIDEO, ("StableVideoDiffusion", "SVD", "SV3D")),
    Other("SDXL's refiner, which cannot begin from noise", XL, ("SDXLRefiner",)),
    Other("SDXL made smaller", XL, ("SSD1B", "SegmindVega", "KOALA")),
)
# These have the layers of a supported family, and differ in what their names below say.
LCM = Other("a whole latent consistency model (LCM), conditioned on the guidance", f"{SD15} or XL with an LCM LoRA", ())
SD35_LARGE = Other("Stable Diffusion 3.5 large", SD35, ())
LARGE_LAYERS = 38  # of SD 3.5 large; 3 and 3.5 medium have 24


def of_class(name: str) -> Other | None:
    """The family of a pipeline in diffusers, or of a model in ComfyUI, by the name of its class."""
    plain = name.replace("_", "")
    return next((other for other in _OTHERS if plain.startswith(other.classes)), None)


def of_weights(names: Collection[str]) -> Other | None:
    """The family of a file, by the names of its weights."""
    return next((other for other in _OTHERS if any(key in name for name in names for key in other.keys)), None)
