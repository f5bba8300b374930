"""Finding prompts longer than a text encoder reads, because CLIP's tokenizers truncate them silently."""

from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any


@dataclass(frozen=True)
class CutPrompt:
    """A prompt of `tokens` tokens, of which only the first `limit`, with the text `read`, reach the encoder.

    Both counts include the start and end tokens.
    """

    prompt: str
    tokens: int
    limit: int
    read: str


def too_long(tokenizer: Any, prompts: Iterable[str], limit: int | None = None) -> list[CutPrompt]:
    """The prompts that are too long, each once.

    Args:
        tokenizer: from transformers; it adds one token before a text and one after it.
        limit: how many tokens the encoder reads; None means the tokenizer's `model_max_length`.
    """
    limit = limit or tokenizer.model_max_length
    cut = []
    for prompt in dict.fromkeys(prompts):
        tokens = tokenizer(prompt, verbose=False).input_ids
        if len(tokens) > limit:
            cut.append(CutPrompt(prompt, len(tokens), limit, tokenizer.decode(tokens[1 : limit - 1]).strip()))
    return cut


def describe_cut(cut: list[CutPrompt]) -> str:
    """One line for a user: how many prompts are too long, and where the longest is cut off. `cut` must not be empty."""
    longest = max(cut, key=lambda found: found.tokens)
    count = f"{len(cut)} prompts are" if len(cut) > 1 else "a prompt is"
    which = "; the longest" if len(cut) > 1 else ""
    return (
        f"{count} longer than the text encoder reads{which}, {shorten(longest.prompt, 80, placeholder='...')!r}, has "
        f"{longest.tokens} tokens, the limit is {longest.limit}, and is read up to {longest.read[-40:]!r}; shorten it: "
        "the model never sees the rest"
    )
