"""Converts a MODEL of Z-Image, and its CLIP, which is a language model, to what the trainer uses."""

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from diffusers import ZImageTransformer2DModel

from comfy_tdpo.clean_text import one_line
from comfy_tdpo.models.conditioning import ListConditioning
from comfy_tdpo.models.kind import Z_IMAGE, Z_IMAGE_TURBO, is_turbo_shift
from comfy_tdpo.models.z_image import ZImage
from comfy_tdpo.process.flow_schedule import PATCH, FlowSchedule

from .native import Native, converted, flow_schedule_of
from .weights_in import check_embeds

MAP = "z_image_to_diffusers"  # of comfy.utils, in versions that know Z-Image
WIDTH = 3840  # of the published network; that of Lumina 2, which has the same blocks, is narrower
# What diffusers' transformer has by the same name.
_SAME = ("dim", "n_layers", "n_heads", "n_kv_heads", "cap_feat_dim", "axes_dims", "axes_lens", "rope_theta")
# What ComfyUI may find in a file that is not Z-Image's text to image, and the value without it.
_OTHERS = {"siglip_feat_dim": None, "clip_text_dim": None, "patch_size": PATCH}


def is_z_image(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether a MODEL is Z-Image, even if this ComfyUI takes it for Lumina 2, as it does before it knows Z-Image."""
    config = model.model.model_config.unet_config
    of_lumina = config.get("image_model") == "lumina2"
    return of_lumina and (config.get("z_image_modulation", False) or config.get("dim") == WIDTH)


def transformer_config(model: comfy.model_patcher.ModelPatcher) -> dict:
    """The configuration for diffusers of the transformer in a MODEL.

    Raises:
        ValueError: this ComfyUI is too old for Z-Image, or the MODEL has other blocks.
    """
    config = model.model.model_config.unet_config
    if not config.get("z_image_modulation") or not hasattr(comfy.utils, MAP):
        raise ValueError(
            "got a MODEL of Z-Image, whose layers this ComfyUI does not know; expected ComfyUI 0.10 or newer: update it"
        )
    known = all(config.get(name, value) == value for name, value in _OTHERS.items())
    if not known or not config.get("pad_tokens_multiple") or config["n_kv_heads"] != config["n_heads"]:
        raise ValueError(
            "got a MODEL of the family ZImage with other inputs or blocks than Z-Image and Z-Image-Turbo; expected one "
            "of these: load another"
        )
    return {name: config[name] for name in _SAME} | {
        "in_channels": config["in_channels"],
        "n_refiner_layers": config.get("n_refiner_layers", 2),
    }


def widths(model: comfy.model_patcher.ModelPatcher) -> tuple[int, None]:
    """How wide the states are that the transformer takes; it takes no pooled ones."""
    return transformer_config(model)["cap_feat_dim"], None


def diffusers_transformer(
    model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype = torch.float32
) -> ZImageTransformer2DModel:
    """The transformer of a MODEL for diffusers, in `dtype` on the CPU, with the LoRAs applied to it baked in.

    Raises:
        ValueError: the MODEL has other blocks, or a weight is not finite.
    """
    config = transformer_config(model)
    places = getattr(comfy.utils, MAP)(model.model.model_config.unet_config)
    return converted(model, dtype, ZImageTransformer2DModel, config, places)


def flow_schedule(model: comfy.model_patcher.ModelPatcher) -> FlowSchedule:
    """The noise levels of a MODEL, whose shift a node may have changed."""
    return flow_schedule_of(model, "Z-Image", "ModelSamplingAuraFlow")


def preset_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """Turbo's, unless a node gives the MODEL the base model's shift: ComfyUI gives both the shift of Turbo."""
    shift, *_ = flow_schedule(model).numbers
    return Z_IMAGE_TURBO if is_turbo_shift(shift) else Z_IMAGE


class EncodedStates:
    """A PromptEncoder with prompts that a CLIP which is a language model encoded in advance, as a training must not
    load models by itself: states (L, E) of each, without padding.

    Args:
        clip: the CLIP; texts: what it reads for each prompt that will ever be needed; the empty one is always included.
        device: where to return the states, which are kept in main memory.

    Raises:
        ValueError: a state is not finite.
    """

    pooled_width = None

    def __init__(self, clip: comfy.sd.CLIP, texts: dict[str, str], device: torch.device):
        self._device, self._states = device, {}
        for prompt, text in ({"": ""} | {one_line(prompt): text for prompt, text in texts.items()}).items():
            found = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True, return_dict=True)
            states, mask = found["cond"], found.get("attention_mask")
            check_embeds(prompt, states, clip.cond_stage_model)
            with torch.inference_mode(False), torch.no_grad():
                kept = states[0].to("cpu", torch.float32, copy=True)
                self._states[prompt] = kept if mask is None else kept[mask[0].to("cpu", copy=True).bool()]

    @property
    def width(self) -> int:
        return self._states[""].shape[-1]

    def __call__(self, prompts: list[str]) -> ListConditioning:
        return ListConditioning([self._states[one_line(prompt)].to(self._device) for prompt in prompts])


NATIVE = Native(
    recognizes=is_z_image,
    preset=preset_of,
    widths=widths,
    network=diffusers_transformer,
    schedule=flow_schedule,
    encode=lambda model, clip, texts, device: EncodedStates(clip, texts, device),
    kind=ZImage,
)
