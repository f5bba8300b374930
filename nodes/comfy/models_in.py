"""Converts ComfyUI's MODEL, CLIP and VAE to what the trainer uses.

The training shares nothing with its inputs: weights are copied, with the LoRAs applied to a MODEL baked in, and the
copies belong to the caller. They are made outside of inference mode, in which ComfyUI runs its nodes and whose tensors
cannot be trained.
"""

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
from . import flux_in, sd3_in, shapes_out, z_image_in
from .baked import model_name
from .decoder import ComfyDecoder
from .encoded import EncodedPrompts
from .native import Native, converted
from .weights_in import check_plain

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
        return Wanted(model=model_name(self.model), preset=self._family.preset(self.model), **inputs)

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

    def _parts(self, prompts: Prompts, device: torch.device) -> tuple[Any, ComfyDecoder, Any]:
        """The PromptEncoder, the decoder and the noise schedule."""
        texts, family = {words: prompts.for_clip(words) for words in prompts.words}, self._family
        encode = family.encode(self.model, self.clip, texts, device)
        return encode, ComfyDecoder(self.vae, self.model), family.schedule(self.model)

    def _maker(self, config: TrainConfig, encode: Any, decode: ComfyDecoder, scheduler: Any) -> MakePolicy:
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


def diffusers_unet(model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The U-Net of a MODEL for diffusers, in `dtype` on the CPU, with the LoRAs applied to it baked in.

    Raises:
        ValueError: the MODEL is not Stable Diffusion 1.x, 2.x or XL.
    """
    config = diffusers_config(model)  # refuses other families, whose names are not looked up then
    places = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return converted(model, dtype, UNet2DConditionModel, config, places)


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


def unet_widths(model: comfy.model_patcher.ModelPatcher) -> tuple[int, int | None]:
    """How wide the embeddings and the pooled embeddings are that the U-Net of a MODEL takes; None without the latter.

    Raises:
        ValueError: the MODEL cannot be trained.
    """
    config = diffusers_config(model)
    return config["cross_attention_dim"], pooled_width(config)


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
    shapes_out.FLOW,
    sd3_in.NATIVE,
    flux_in.NATIVE,
    z_image_in.NATIVE,
    Native(
        recognizes=lambda model: True,
        preset=lambda model: SHAPES if shapes_out.is_shapes(model) else XL if is_xl(model) else SD,
        widths=unet_widths,
        network=diffusers_unet,
        schedule=scheduler_of,
        encode=lambda model, clip, texts, device: EncodedPrompts(clip, texts, device, pooled=is_xl(model)),
        kind=StableDiffusion,
    ),
)
