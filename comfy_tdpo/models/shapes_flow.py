"""The family of the flow-matching model of Shapes: the transformer of Stable Diffusion 3, conditioned on the states and
the pooled state of one CLIP.

Its folder, `flow` in a world of Shapes, has only what the U-Net's folder `pipeline` beside it has not: the transformer
and the schedule. The autoencoder and the text encoder are read there.

Shapes: B batch, L tokens, E text width, P pooled width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from . import Outline
from .conditioning import TensorConditioning
from .diffusers_folder import latent_factor, load_parts
from .flow_transformer import check_no_prediction
from .kind import is_flow_of_shapes
from .scheduler import flow_schedule_in
from .stable_diffusion import Autoencoder, ClipText
from .stable_diffusion_3 import StableDiffusion3

NAME = "the flow model of Shapes"
_SHARED = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
_OWN = {"transformer": SD3Transformer2DModel}


class PooledText(ClipText):
    """A PromptEncoder: the last hidden state of a CLIP text model, (B, L, E), and its pooled state, (B, P)."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel):
        super().__init__(tokenizer, text_encoder)
        self.networks = {"text_encoder": text_encoder}

    def __call__(self, prompts: list[str]) -> TensorConditioning:
        outputs = self.outputs(prompts)
        return TensorConditioning(states=outputs.last_hidden_state, pooled=outputs.pooler_output)


class ShapesFlowFamily:
    """Loads the folder of a flow model in a world of Shapes."""

    def recognizes(self, source: str) -> bool:
        return is_flow_of_shapes(source)

    def outline(self, source: str, prediction_type: str | None) -> Outline:
        check_no_prediction(prediction_type, NAME)
        folder, shared = _folders(source)
        schedule = flow_schedule_in(folder)
        return Outline(schedule, StableDiffusion3.process, latent_factor(shared), StableDiffusion3.patch)

    def load(self, source: str, dtype: torch.dtype, prediction_type: str | None) -> StableDiffusion3:
        schedule = self.outline(source, prediction_type).scheduler
        folder, shared = _folders(source)
        parts = load_parts(folder, _OWN, dtype) | load_parts(shared, _SHARED, dtype)
        encode = PooledText(parts["tokenizer"], parts["text_encoder"])
        return StableDiffusion3(parts["transformer"], schedule, encode, Autoencoder(parts["vae"]), source)


def _folders(source: str) -> tuple[Path, Path]:
    """The model's own folder, and that of the parts it shares with the U-Net."""
    folder = Path(source).expanduser().absolute()
    return folder, folder.parent / "pipeline"


FAMILY = ShapesFlowFamily()
