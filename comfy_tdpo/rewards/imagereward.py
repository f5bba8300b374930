"""ImageReward: how people rate an image for a prompt (Xu et al., 2023, arXiv 2304.05977).

It uses transformers' implementation of BLIP's image-grounded text encoder and maps upstream's names to it. The scores
are upstream's. The checkpoint's entries for other uses of BLIP (two projections, a buffer) are not read.
"""

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import WordPiece
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from .head import LinearHead
from .options import Options
from .pixels import pillow_pixels
from .weights import Source, find_weights, load_weights

# BLIP's ViT-L/16 and its BERT, as in upstream's med_config.json.
VISION: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "is_decoder": True,  # how transformers enables cross-attention
}
TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output over upstream's training images

MODEL = Source("THUDM/ImageReward", "ImageReward.pt", "1.8 GB", "Apache-2.0")
VOCABULARY = Source("google-bert/bert-base-uncased", "vocab.txt", "0.2 MB", "Apache-2.0")

# transformers' name -> upstream's name; the first match wins
_NAMES = [
    (r"^text\.", "blip.text_encoder."),
    (r"^vision\.embeddings\.class_embedding", "blip.visual_encoder.cls_token"),
    (r"^vision\.embeddings\.position_embedding", "blip.visual_encoder.pos_embed"),
    (r"^vision\.embeddings\.patch_embedding\.", "blip.visual_encoder.patch_embed.proj."),
    (r"^vision\.post_layernorm\.", "blip.visual_encoder.norm."),
    (r"^vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blip.visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blip.visual_encoder.blocks.\1.attn.proj."),
    (r"^vision\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blip.visual_encoder.blocks.\1.norm\2."),
    (r"^vision\.encoder\.layers\.(\d+)\.mlp\.", r"blip.visual_encoder.blocks.\1.mlp."),
]


def upstreams_name(name: str) -> str:
    return next((re.sub(ours, theirs, name) for ours, theirs in _NAMES if re.match(ours, name)), name)


class ImageGroundedText(nn.Module):
    """Pixels (B, 3, H, W), token ids and their mask (B, L) to image-grounded text features (B, D)."""

    def __init__(self):
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**VISION))
        self.text = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        image = self.vision(pixel_values=pixels).last_hidden_state
        seen = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        text = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=seen
        )
        return text.last_hidden_state[:, 0].float()


def _tokenizer(vocabulary: Path) -> BertWordPieceTokenizer:
    """BERT's tokenizer, with upstream's truncation and padding."""
    words = WordPiece.read_file(str(vocabulary))
    expected = TEXT["vocab_size"] - 2  # without BLIP's own [DEC] and [ENC], which no prompt contains
    if len(words) != expected or not {"[CLS]", "[SEP]", "[PAD]", "[UNK]"} <= words.keys():
        raise ValueError(f"{vocabulary} holds {len(words)} words, not BERT's {expected}; expected {VOCABULARY}")
    tokenizer = BertWordPieceTokenizer(words, lowercase=True)
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return tokenizer


class ImageReward:
    """Scores of about -2 to 2. Image and text are encoded together, so there is no image encoder for a critic."""

    sources = (MODEL, VOCABULARY)
    differentiable = True
    embed_dim = None

    def __init__(self, name: str, options: Options):
        self.name = name
        path = find_weights(name, MODEL, options.weights)
        vocabulary = find_weights(name, VOCABULARY, options.weights_folder)
        with init_empty_weights():
            encoder, head = ImageGroundedText(), LinearHead(TEXT["hidden_size"])
        self.encoder = load_weights(encoder, path, MODEL, options.dtype, upstreams_name).to(options.device)
        self.head = load_weights(head, path, MODEL, key=lambda name: f"mlp.{name}").to(options.device)
        self.dtype = options.dtype
        self.tokenizer = _tokenizer(vocabulary)

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError(f"{self.name} has no encoder of images alone")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        texts = self.tokenizer.encode_batch(prompts)
        tokens = torch.tensor([text.ids for text in texts], device=images.device)
        mask = torch.tensor([text.attention_mask for text in texts], device=images.device)
        pixels = pillow_pixels(images, VISION["image_size"]).to(self.dtype)
        return (self.head(self.encoder(pixels, tokens, mask)) - MEAN) / STD

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt can be scored."""
