"""The untrained parts of the models of Shapes: U-Net, flow transformer, text encoder and noise schedule."""

from diffusers import DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
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


def new_transformer() -> SD3Transformer2DModel:
    """The transformer of Stable Diffusion 3 in miniature, 3.75 M weights, which reads the states of one text encoder.

    Its modulation and its output begin at zero, as in DiT (Peebles and Xie, 2023, section 3.2): each block is the
    identity, and the first flow is zero.
    """
    heads, width = 3, 64  # of a head; ComfyUI expects as many heads as layers
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=heads,
        num_attention_heads=heads,
        attention_head_dim=width,
        joint_attention_dim=64,
        caption_projection_dim=heads * width,
        pooled_projection_dim=64,
        pos_embed_max_size=IMAGE_SIZE // 16,
        qk_norm="rms_norm",
    )
    blocks = transformer.transformer_blocks
    norms = [norm for block in blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*(norm.linear for norm in norms), transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


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
