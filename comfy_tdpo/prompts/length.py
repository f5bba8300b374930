"""Prompts longer than a text encoder reads: CLIP's tokenizers cut them off without a word."""

from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any


@dataclass(frozen=True)
class CutPrompt:
    """A prompt of `tokens` tokens (start and end included) of which only the text `read`, with `limit`, is read."""

    prompt: str
    tokens: int
    limit: int
    read: str


def too_long(tokenizer: Any, prompts: Iterable[str], limit: int | None = None) -> list[CutPrompt]:
    """Those of `prompts` that do not fit, each once.

    Args:
        tokenizer: of transformers, which puts one token before a text and one after it.
        limit: tokens that the encoder reads, where it is not the tokenizer's own `model_max_length`.
    """
    limit = limit or tokenizer.model_max_length
    cut = []
    for prompt in dict.fromkeys(prompts):
        tokens = tokenizer(prompt, verbose=False).input_ids
        if len(tokens) > limit:
            cut.append(CutPrompt(prompt, len(tokens), limit, tokenizer.decode(tokens[1 : limit - 1]).strip()))
    return cut


def describe_cut(cut: list[CutPrompt]) -> str:
    """One line for a user: how many, and of the longest which it is and where reading stops. `cut` is not empty."""
    longest = max(cut, key=lambda found: found.tokens)
    count = f"{len(cut)} prompts are" if len(cut) > 1 else "a prompt is"
    which = "; the longest" if len(cut) > 1 else ""
    return (
        f"{count} longer than the text encoder reads{which}, {shorten(longest.prompt, 80, placeholder='...')!r}, has "
        f"{longest.tokens} tokens of at most {longest.limit} and is read up to {longest.read[-40:]!r}; shorten it: "
        "the model never sees the rest"
    )
