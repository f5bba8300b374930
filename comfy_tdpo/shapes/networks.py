"""The untrained parts of the pipeline of Shapes: U-Net, text encoder and noise schedule."""

from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from .encoders import clip_config
from .scenes import IMAGE_SIZE

# Groups of every GroupNorm. With the usual 32, the groups of narrow layers have one or two channels, and normalising
# removes their mean just before the last convolution, so the network can hardly set the level of a flat background.
NORM_GROUPS = 8


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        layers_per_block=1,
        block_out_channels=(64, 96),
        norm_num_groups=NORM_GROUPS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )


def new_text_encoder(tokenizer: CLIPTokenizerFast) -> CLIPTextModel:
    config = clip_config(len(tokenizer), tokenizer.eos_token_id).text_config
    return CLIPTextModel(CLIPTextConfig(**config.to_dict()))


def new_scheduler() -> DDIMScheduler:
    """The schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
