"""The text encoder T5, which several families read prompts with.

Shapes: B batch, L tokens, E text width.
"""

from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from ..prompts.length import describe_cut, too_long


class T5Text:
    """The last hidden state of T5's encoder, (B, L, E), with every prompt padded to `length` and nothing masked."""

    def __init__(self, tokenizer: T5TokenizerFast, text_encoder: T5EncoderModel, length: int):
        self.tokenizer, self.network, self.length = tokenizer, text_encoder, length
        text_encoder.encoder.set_input_embeddings(text_encoder.shared)  # one tensor, not two copies of it

    def __call__(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return self.network(tokens.input_ids.to(self.network.device))[0]

    def cut(self, prompts: list[str]) -> str:
        """One line about those of `prompts` that it truncates; empty if there are none."""
        found = too_long(self.tokenizer, prompts, self.length)
        return describe_cut(found) if found else ""
