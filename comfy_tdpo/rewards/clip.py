"""transformers' CLIP: the published architectures, and the parts of them that rewards use."""

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel


def architecture(
    vision: tuple[int, int, int], text: tuple[int, int, int], patch: int, dim: int, activation: str
) -> CLIPConfig:
    """A CLIP for 224 px images; vision and text are (width, layers, heads), and dim is the width of the embeddings."""

    def tower(width: int, layers: int, heads: int) -> dict:
        return dict(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
            projection_dim=dim,
        )

    return CLIPConfig(
        projection_dim=dim,
        vision_config=dict(**tower(*vision), image_size=224, patch_size=patch),
        text_config=tower(*text),
    )


# The first two are OpenAI's, with its quick GELU; the third is LAION's.
VIT_B_32 = architecture((768, 12, 12), (512, 12, 8), patch=32, dim=512, activation="quick_gelu")
VIT_L_14 = architecture((1024, 24, 16), (768, 12, 12), patch=14, dim=768, activation="quick_gelu")
VIT_H_14 = architecture((1280, 32, 16), (1024, 24, 16), patch=14, dim=1024, activation="gelu")


class ClipImages(nn.Module):
    """The image half of a CLIP: pixels (B, 3, H, W) to embeddings (B, D)."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.visual_projection.weight.dtype)
        return self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output).float()


class Clip(ClipImages):
    """Both halves of a CLIP."""

    def __init__(self, clip: CLIPModel):
        super().__init__(clip)
        self.text_model, self.text_projection, self.logit_scale = (
            clip.text_model,
            clip.text_projection,
            clip.logit_scale,
        )

    def read(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) to embeddings (B, D)."""
        return self.text_projection(self.text_model(input_ids=tokens).pooler_output).float()


def empty_clip(config: CLIPConfig) -> CLIPModel:
    """A model of that architecture whose weights take no memory yet; they have to be filled in."""
    with init_empty_weights():
        return CLIPModel(config)
