"""The image-text encoders of Shapes: a tiny CLIP for the training rewards, and two other architectures for
`shapes-judge` and `shapes-match`.

All map images in [0, 1], (B, 3, H, W), and captions to unit vectors, whose cosine measures how well they match.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from ..quiet import quiet_loading

ENCODER_IMAGE_SIZE = 64
MAX_TOKENS = 16


def clip_config(vocab_size: int, eos_token_id: int) -> CLIPConfig:
    """Encoder A: a toy-sized CLIP (Radford et al., 2021) with a ViT over 8x8 patches."""
    return CLIPConfig(
        projection_dim=64,
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=64,
            bos_token_id=eos_token_id - 1,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        ),
        vision_config=dict(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            image_size=ENCODER_IMAGE_SIZE,
            patch_size=8,
            projection_dim=64,
        ),
    )


def tokenize(tokenizer: CLIPTokenizerFast, captions: list[str]) -> Tensor:
    """Token ids of `captions`, (B, MAX_TOKENS), padded or truncated."""
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return tokens.input_ids


class ClipEncoder(nn.Module):
    """Encoder A: transformers' CLIPModel with `embed_images` and `embed_tokens`."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip

    def embed_images(self, images: Tensor) -> Tensor:
        vision = self.clip.vision_model(pixel_values=_preprocess(images)).pooler_output
        return F.normalize(self.clip.visual_projection(vision), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        text = self.clip.text_model(input_ids=tokens).pooler_output
        return F.normalize(self.clip.text_projection(text), dim=-1)


class JudgeEncoder(nn.Module):
    """Encoder B: a plain convolutional network for images and a recurrent network for captions."""

    def __init__(self, vocab_size: int, width: int = 32, dim: int = 64):
        super().__init__()
        widths = [3, width, 2 * width, 3 * width, 4 * width]
        self.image = nn.Sequential(
            *[_down_block(a, b) for a, b in pairwise(widths)],
            nn.Flatten(),
            nn.Linear(widths[-1] * 16, dim),
        )
        self.token = nn.Embedding(vocab_size, 48)
        self.reader = nn.GRU(48, dim, batch_first=True)
        self.text = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # CLIP's initial value, ln(1 / 0.07)

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(self.image(_preprocess(images)), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        _, last = self.reader(self.token(tokens))
        return F.normalize(self.text(last[0]), dim=-1)


class MatchEncoder(nn.Module):
    """The encoder of shapes-match: a ConvNeXt (Liu et al., 2022) in miniature with attention pooling for images, and
    convolutions with max pooling (Kim, 2014) for captions.
    """

    def __init__(self, vocab_size: int, widths: tuple[int, int] = (64, 128), heads: int = 8, dim: int = 64):
        super().__init__()
        narrow, wide = widths
        self.image = nn.Sequential(
            nn.Conv2d(3, narrow, 4, stride=4),
            _NextBlock(narrow),
            _NextBlock(narrow),
            nn.Conv2d(narrow, wide, 2, stride=2),
            *[_NextBlock(wide) for _ in range(3)],
        )
        self.place = nn.Parameter(0.02 * torch.randn((ENCODER_IMAGE_SIZE // 8) ** 2, wide))
        self.pool = _AttentionPool(wide, heads)
        self.image_projection = nn.Linear(wide, dim)
        self.token = nn.Embedding(vocab_size, 48)
        self.reader = nn.Sequential(
            nn.Conv1d(48, wide, 3, padding=1), nn.GELU(), nn.Conv1d(wide, wide, 3, padding=1), nn.GELU()
        )
        self.text_projection = nn.Linear(wide, dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.3026))  # SigLIP's initial value, ln 10
        self.logit_bias = nn.Parameter(torch.tensor(-6.0))  # about ln of the share of captions that are true

    def embed_images(self, images: Tensor) -> Tensor:
        features = self.image(_preprocess(images)).flatten(2).mT + self.place
        return F.normalize(self.image_projection(self.pool(features)), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_projection(self.reader(self.token(tokens).mT).amax(-1)), dim=-1)


class PreferenceHead(nn.Module):
    """Predicts the preference, 0 to 10 points, from encoder A's unit embedding, (B, D) -> (B,)."""

    def __init__(self, dim: int = 64, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, embeds: Tensor) -> Tensor:
        return self.layers(embeds)[:, 0]


def load_tokenizer(world: Path) -> CLIPTokenizerFast:
    """The tokenizer in the folder `world`, which the encoders and the pipeline share."""
    return CLIPTokenizerFast.from_pretrained(world / "clip", local_files_only=True)


def load_clip_encoder(world: Path) -> ClipEncoder:
    """Encoder A from the folder `world`, frozen."""
    with quiet_loading():
        clip = CLIPModel.from_pretrained(world / "clip", local_files_only=True)
    return ClipEncoder(clip).eval().requires_grad_(False)


def load_judge_encoder(world: Path) -> JudgeEncoder:
    """Encoder B from the folder `world`, frozen."""
    weights = load_file(world / "judge" / "model.safetensors")
    judge = JudgeEncoder(vocab_size=len(weights["token.weight"]))
    judge.load_state_dict(weights)
    return judge.eval().requires_grad_(False)


def load_match_encoder(world: Path) -> MatchEncoder:
    """The encoder of shapes-match from the folder `world`, frozen; its file is in float16."""
    weights = load_file(world / "match" / "model.safetensors")
    match = MatchEncoder(vocab_size=len(weights["token.weight"]))
    match.load_state_dict(weights)
    return match.eval().requires_grad_(False)


def load_preference_head(world: Path) -> PreferenceHead:
    """The head of `shapes-aesthetic` from the folder `world`, frozen."""
    head = PreferenceHead()
    head.load_state_dict(load_file(world / "clip" / "preference_head.safetensors"))
    return head.eval().requires_grad_(False)


def _down_block(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )


class _NextBlock(nn.Module):
    """A residual block: a depthwise convolution, then two layers at each position, (B, C, H, W) -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.spread = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(self.spread(features).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _AttentionPool(nn.Module):
    """Each head's own mean over positions, weighted by what it looks for, (B, N, C) -> (B, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Linear(width, heads)
        self.value = nn.Linear(width, width)
        self.heads = heads

    def forward(self, features: Tensor) -> Tensor:
        features = self.norm(features)
        weights = self.weight(features).softmax(1)  # (B, N, heads)
        values = self.value(features).unflatten(-1, (self.heads, -1))
        return torch.einsum("bnh,bnhc->bhc", weights, values).flatten(1)


def _preprocess(images: Tensor) -> Tensor:
    """Resize to the encoders' input size if necessary, and map [0, 1] to [-1, 1]."""
    size = (ENCODER_IMAGE_SIZE, ENCODER_IMAGE_SIZE)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    return images.clamp(0, 1) * 2 - 1
