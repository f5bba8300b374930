"""Converts ComfyUI's MODEL, CLIP and VAE to what the trainer uses.

The training shares nothing with its inputs: weights are copied, with the LoRAs applied to a MODEL baked in, and the
copies belong to the caller. They are made outside of inference mode, in which ComfyUI runs its nodes and whose tensors
cannot be trained.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from comfy_tdpo.clean_text import one_line
from comfy_tdpo.models.conditioning import TensorConditioning
from comfy_tdpo.models.files import SUPPORTED
from comfy_tdpo.models.kind import SD, SHAPES, XL
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.models.unsupported import EDM, of_class
from comfy_tdpo.policy import DiffusionPolicy

from ...trainer.assemble import DTYPES, assemble, policy_settings
from ...trainer.config import TrainConfig
from ...trainer.evaluation.work import MakePolicy
from ...trainer.job import TrainingFactory
from ...trainer.recommend.options import unseen_prompts
from ..runs.checks import check_run
from ..runs.prompts import Prompts
from ..runs.settings import Wanted
from . import flux_in, sd3_in
from .baked import baked_weights, model_name
from .decoder import ComfyDecoder
from .native import Native
from .shapes_out import is_shapes
from .weights_in import check_embeds, check_plain

EXPECTED = f"expected {SUPPORTED}, for text to image"
SIZES, SIZE_WIDTH = 6, 256  # of an image, which XL is conditioned on, and how wide each is embedded


@dataclass(frozen=True)
class Wires:
    """The MODEL, CLIP and VAE connected to a node."""

    model: Any
    clip: Any
    vae: Any

    def wanted(self, **inputs: Any) -> Wanted:
        """What is asked for with this MODEL.

        Raises:
            ValueError: the CLIP or VAE is missing, or the MODEL cannot be trained.
        """
        self.check()
        preset = SHAPES if is_shapes(self.model) else self._family.preset(self.model)
        return Wanted(model=model_name(self.model), preset=preset, **inputs)

    def check(self) -> None:
        """Raise ValueError if the CLIP or VAE is missing, or the MODEL is none that a policy can be made of."""
        for name, part in (("CLIP", self.clip), ("VAE", self.vae)):
            if part is None:
                raise ValueError(
                    f"got no {name}, as the checkpoint has none; expected one: load it from a separate file"
                )
        self._family.widths(self.model)
        if self.model.hook_patches:
            raise ValueError(
                "got a MODEL with a LoRA whose strength changes over the sampling steps, which cannot become part of "
                "the base model; expected none: set blend_over_steps of TDPO LoRA Apply to 'none'"
            )
        check_plain(self.model.model.diffusion_model)

    def factory(self, config: TrainConfig, prompts: Prompts, device: torch.device) -> TrainingFactory:
        """A factory of the Training, with copies of the three models.

        Raises:
            ValueError: the three do not belong together, weights are not finite, or the run could not start.
        """
        more = unseen_prompts(config, prompts.words, prompts.words)[0] if config.output.recommend else []
        encode, decode, scheduler = self._parts(Prompts([*prompts.words, *more], prompts.written), device)
        kind = self._family.kind
        check_run(config, prompts.words, scheduler, kind.process, decode.factor * kind.patch)
        make_policy = self._maker(config, encode, decode, scheduler)
        return lambda run, stop, watch: assemble(run.config, run, stop, watch, make_policy, cpu=device.type == "cpu")

    def policy_maker(self, config: TrainConfig, prompts: Prompts, device: torch.device) -> MakePolicy:
        """What makes one policy on `device`, with copies of the three models, for these prompts alone.

        Raises:
            ValueError: the three do not belong together, or weights are not finite.
        """
        return self._maker(config, *self._parts(prompts, device))

    @property
    def _family(self) -> Native:
        return next(family for family in FAMILIES if family.recognizes(self.model))

    def _parts(self, prompts: Prompts, device: torch.device) -> "tuple[EncodedPrompts, ComfyDecoder, Any]":
        texts, family = {words: prompts.for_clip(words) for words in prompts.words}, self._family
        _, pooled = family.widths(self.model)
        encode = EncodedPrompts(self.clip, texts, device, pooled=pooled is not None, joint=family.joint)
        return encode, ComfyDecoder(self.vae, self.model), family.schedule(self.model)

    def _maker(self, config: TrainConfig, encode: "EncodedPrompts", decode: ComfyDecoder, scheduler: Any) -> MakePolicy:
        family = self._family
        width, pooled = family.widths(self.model)
        for what, got, expected in (
            ("embeddings", encode.width, width),
            ("pooled embeddings", encode.pooled_width, pooled),
        ):
            if got != expected:
                raise ValueError(
                    f"got a CLIP whose {what} are {got} wide; expected {expected}: use the CLIP of the MODEL's "
                    "checkpoint"
                )
        network = family.network(self.model, DTYPES[config.precision])
        return partial(_policy, partial(family.kind, network, scheduler, encode), decode)


def _policy(make: Any, decode: ComfyDecoder, config: TrainConfig, device: torch.device) -> DiffusionPolicy:
    return DiffusionPolicy(make(decode.to(device), config.model), **policy_settings(config, device))


def _widths(model: comfy.model_patcher.ModelPatcher) -> tuple[int, int | None]:
    config = diffusers_config(model)
    return config["cross_attention_dim"], pooled_width(config)


def diffusers_unet(model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The U-Net of a MODEL for diffusers, in `dtype` on the CPU, with the LoRAs applied to it baked in.

    Raises:
        ValueError: the MODEL is not Stable Diffusion 1.x, 2.x or XL.
    """
    config = diffusers_config(model)
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    with torch.inference_mode(False), torch.no_grad():
        weights = baked_weights(model, dtype)
        with torch.device("meta"):  # skips initialising weights that are replaced anyway
            unet = UNet2DConditionModel(**config)
        unet.load_state_dict({name: weights[names[name]] for name in unet.state_dict()}, assign=True)
    return unet.eval()


def diffusers_config(model: comfy.model_patcher.ModelPatcher) -> dict:
    """The configuration for diffusers of the U-Net in a MODEL."""
    config = model.model.model_config.unet_config
    width, context = config.get("model_channels"), config.get("context_dim")
    if not (width and isinstance(context, int)) or (config.get("adm_in_channels") and not is_xl(model)):
        raise another_family(model)
    if config["in_channels"] != 4:
        raise ValueError(f"got a MODEL that takes {config['in_channels']} channels (inpainting); {EXPECTED}")
    channels = [int(multiple * width) for multiple in config["channel_mult"]]
    layers = config["num_res_blocks"]
    depths = [config["transformer_depth"][sum(layers[:i])] for i in range(len(layers))]  # of each block
    crossing = [depth > 0 for depth in depths]
    if not _alike(config, depths):
        raise another_family(model)
    heads, head_width = config["num_heads"], config["num_head_channels"]
    (groups,) = {m.num_groups for m in model.model.diffusion_model.modules() if isinstance(m, nn.GroupNorm)}
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": layers[0],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "down_block_types": ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossing],
        "up_block_types": ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossing)],
        # diffusers' name for the number of heads
        "attention_head_dim": heads if heads > 0 else [channel // head_width for channel in channels],
        "cross_attention_dim": context,
        "use_linear_projection": config.get("use_linear_in_transformer", False),
        "norm_num_groups": groups,
    } | (_xl_config(config) if is_xl(model) else {})


def another_family(model: comfy.model_patcher.ModelPatcher) -> ValueError:
    kind = type(model.model.model_config).__name__
    if other := of_class(kind):
        return ValueError(f"got a MODEL of {other.name}; {EXPECTED}: nearest to it is {other.nearest}")
    return ValueError(f"got a MODEL of the family {kind}; {EXPECTED}: load such a checkpoint")


def is_xl(model: comfy.model_patcher.ModelPatcher) -> bool:
    return isinstance(model.model.model_config, comfy.supported_models.SDXL)


def _xl_config(config: dict) -> dict:
    """How XL's U-Net is conditioned on a pooled state and on the sizes of an image."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": config["adm_in_channels"],
    }


def pooled_width(config: dict) -> int | None:
    """The width of the pooled state in a U-Net's configuration for diffusers; None without one."""
    both = config.get("projection_class_embeddings_input_dim")
    return both and both - SIZES * SIZE_WIDTH


def _alike(config: dict, depths: list[int]) -> bool:
    """Whether the transformers of a block have its depth, on the way down and up, and the middle that of the last."""
    layers = config["num_res_blocks"]
    down = [depth for depth, count in zip(depths, layers, strict=True) for _ in range(count)]
    up = [depth for depth, count in zip(depths, layers, strict=True) for _ in range(count + 1)]
    middle = config["transformer_depth_middle"]
    return (config["transformer_depth"], config["transformer_depth_output"], middle) == (down, up, max(depths[-1], 1))


def scheduler_of(model: comfy.model_patcher.ModelPatcher) -> DDIMScheduler:
    """The noise schedule of a MODEL, with the step offset that leaves noise in the last step."""
    sampling = model.get_model_object("model_sampling")  # a node may have replaced the model's own
    bases = {base.__name__ for base in type(sampling).__mro__}
    if bases & {"EDM", "X0", "CONST"} or not bases & {"EPS", "V_PREDICTION"}:
        raise ValueError(f"got a MODEL that predicts neither noise nor v ({', '.join(sorted(bases))}); {EXPECTED}")
    if "ModelSamplingContinuousEDM" in bases:
        raise ValueError(f"got a MODEL of {EDM}; {EXPECTED}")
    if "ModelSamplingDiscreteDistilled" in bases:
        raise ValueError(
            "got a MODEL that ModelSamplingDiscrete has set to lcm; expected one without that node: connect what it "
            'has as input, and write process = "lcm" into settings'
        )
    alpha_bar = 1 / (1 + sampling.sigmas.double().cpu() ** 2)
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.float().numpy(),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if "V_PREDICTION" in bases else "epsilon",
    )


# The first that recognizes a MODEL converts it; the last one takes any, and says what is expected if it cannot.
FAMILIES = (
    sd3_in.NATIVE,
    flux_in.NATIVE,
    Native(
        recognizes=lambda model: True,
        preset=lambda model: XL if is_xl(model) else SD,
        widths=_widths,
        network=diffusers_unet,
        schedule=scheduler_of,
        kind=StableDiffusion,
    ),
)


class EncodedPrompts:
    """A PromptEncoder with prompts that a CLIP encoded in advance, as a training must not load models by itself.

    Args:
        clip: the CLIP; texts: what it reads for each prompt that will ever be needed; the empty one is always included.
        device: where to return the embeddings, which are kept in main memory.
        pooled: whether the MODEL needs a pooled embedding too.
        joint: whether the MODEL has joint attention, to which an embedding twice says something else than once. Then
            T5 pads all prompts to the length of the longest.

    Raises:
        ValueError: an embedding is not finite, or with joint attention, a prompt is too long for a CLIP.
    """

    def __init__(
        self,
        clip: comfy.sd.CLIP,
        texts: dict[str, str],
        device: torch.device,
        pooled: bool = False,
        joint: bool = False,
    ):
        self._device = device
        texts = {"": ""} | {one_line(prompt): text for prompt, text in texts.items()}
        tokens = {prompt: clip.tokenize(text) for prompt, text in texts.items()}
        if joint:
            _check_t5(tokens[""])
            padding = {"t5xxl_min_length": max(len(found["t5xxl"][0]) for found in tokens.values())}
            tokens = {prompt: clip.tokenize(text, tokenizer_options=padding) for prompt, text in texts.items()}
        both = {prompt: clip.encode_from_tokens(found, return_pooled=True) for prompt, found in tokens.items()}
        embeds = {prompt: embed for prompt, (embed, _) in both.items()}
        if joint:
            _check_lengths({prompt: embed.shape[1] for prompt, embed in embeds.items()})
        for prompt, found in both.items():
            for embed in found[: 1 + pooled]:
                check_embeds(prompt, embed, clip.cond_stage_model)
        # long prompts have longer embeddings; repeating a whole embedding does not change cross-attention
        length = math.lcm(*(embed.shape[1] for embed in embeds.values()))
        with torch.inference_mode(False), torch.no_grad():
            self._embeds = {
                prompt: embed[0].to("cpu", torch.float32, copy=True).repeat(length // embed.shape[1], 1)
                for prompt, embed in embeds.items()
            }
            self._pooled = {
                prompt: pool[0].to("cpu", torch.float32, copy=True) for prompt, (_, pool) in both.items() if pooled
            }

    @property
    def width(self) -> int:
        return self._embeds[""].shape[-1]

    @property
    def pooled_width(self) -> int | None:
        return self._pooled[""].shape[-1] if self._pooled else None

    def __call__(self, prompts: list[str]) -> TensorConditioning:
        parts = {"states": self._embeds} | ({"pooled": self._pooled} if self._pooled else {})
        rows = {name: torch.stack([part[one_line(prompt)] for prompt in prompts]) for name, part in parts.items()}
        return TensorConditioning(**{name: part.to(self._device) for name, part in rows.items()})


def _check_lengths(lengths: dict[str, int]) -> None:
    """Raise ValueError if the embeddings of some prompts, by `lengths`, are longer than that of the empty one."""
    for prompt, length in lengths.items():
        if length != lengths[""]:
            raise ValueError(
                f"got the prompt {prompt[:60]!r}, which is longer than the 77 tokens that CLIP reads at once; expected "
                "one that is not, for Stable Diffusion 3: shorten it"
            )


def _check_t5(tokens: dict[str, Any]) -> None:
    """Raise ValueError if a CLIP makes no tokens for T5."""
    if "t5xxl" not in tokens:
        raise ValueError(
            f"got a CLIP that reads prompts as {' and '.join(tokens)}, and not as t5xxl; expected the CLIP of the "
            "MODEL, with T5: load it from the MODEL's checkpoint, or by DualCLIPLoader or TripleCLIPLoader"
        )
