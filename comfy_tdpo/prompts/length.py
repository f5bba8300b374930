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
    limit, unique = limit or tokenizer.model_max_length, list(dict.fromkeys(prompts))
    cut = []
    for prompt, tokens in zip(unique, tokenizer(unique, verbose=False).input_ids, strict=True):
        if len(tokens) > limit:
            cut.append(CutPrompt(prompt, len(tokens), limit, tokenizer.decode(tokens[1 : limit - 1]).strip()))
    return cut


def describe_cut(cut: list[CutPrompt]) -> str:
    """One line for a user: how many prompts are too long, and where the longest is cut off. `cut` must not be empty."""
    longest = max(cut, key=lambda found: found.tokens)
    end, prompt = longest.read, repr(shorten(longest.prompt, 80, placeholder="..."))
    if len(end) > 40:
        end = f"...{end[-40:].partition(' ')[2] or end[-40:]}"
    which = f"a prompt is longer than the text encoder reads: {prompt}"
    if len(cut) > 1:
        which = f"{len(cut)} prompts are longer than the text encoder reads: the longest, {prompt},"
    return (
        f"{which} has {longest.tokens} tokens of at most {longest.limit} and is read up to {end!r}; shorten "
        f"{'them' if len(cut) > 1 else 'it'}: the model never sees the rest"
    )
