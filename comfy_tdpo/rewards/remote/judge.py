"""A vision-language model as a judge, behind an OpenAI-compatible server (vLLM, llama.cpp, ...).

It is asked whether the image shows what the prompt says, and the score is P(yes) / (P(yes) + P(no)) by the
probabilities of its first token, whatever its case and the spaces around it. The image is sent as a PNG file, 8 bits
per channel.
"""

import base64
import io
import json
import math
import os
from typing import Any

from PIL import Image
from torch import Tensor

from ..options import Options
from . import address_of, model_of
from .asking import Request
from .client import Client
from .protocol import is_number, json_object

KEY = "COMFY_TDPO_JUDGE_KEY"  # environment variable; a key is never part of a name, which files would keep
QUESTION = (
    "The image was made from this prompt:\n{prompt}\n\nDoes the image show everything that the prompt asks for? "
    "Answer with one word, yes or no."
)
TOP = 20  # tokens whose probabilities are asked for, the most that OpenAI's interface allows


class Judge(Client):
    """One request for each image, a few at a time."""

    remedy = (
        "start an OpenAI-compatible server with that model there, correct the address, which ends in /v1 as a rule, or "
        f"set {KEY} if it wants a key"
    )

    def __init__(self, name: str, options: Options):
        super().__init__(name, options)
        self.headers = {"Content-Type": "application/json"} | _authorization()

    def requests(self, images: Tensor, prompts: list[str]) -> list[Request[list[float]]]:
        url = f"{address_of(self.name).rstrip('/')}/chat/completions"
        levels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        bodies = [self._body(Image.fromarray(level), prompt) for level, prompt in zip(levels, prompts, strict=True)]
        return [Request(url, body, _score_in, self.headers) for body in bodies]

    def _body(self, image: Image.Image, prompt: str) -> bytes:
        file = io.BytesIO()
        image.save(file, "png", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTION.format(prompt=prompt)},
        ]
        asked = {
            "model": model_of(self.name),
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        return json.dumps(asked).encode()


def _authorization() -> dict[str, str]:
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):  # http.client's own message would show it
        raise ValueError(f"got a {KEY} with unusual characters; expected an API key in ASCII: set it again")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _score_in(text: bytes) -> list[float]:
    """The score in an answer; ValueError, with the reason, if there is none."""
    probabilities = {"yes": 0.0, "no": 0.0}
    for token, logprob in _top_tokens(json_object(text)):
        word = token.strip(" \n\t▁Ġ").casefold()  # the last two are how tokenizers write a space
        if word in probabilities:
            probabilities[word] += math.exp(logprob)
    total = sum(probabilities.values())
    if total == 0:
        raise ValueError(f"neither yes nor no is among the {TOP} most probable first tokens")
    return [probabilities["yes"] / total]


def _top_tokens(found: dict[str, Any]) -> list[tuple[str, float]]:
    try:
        tops = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(top["token"], top["logprob"]) for top in tops]
    except (KeyError, IndexError, TypeError):
        raise ValueError("an answer without choices[0].logprobs.content[0].top_logprobs") from None
    for token, logprob in pairs:
        if not isinstance(token, str) or not is_number(logprob) or not logprob <= 1e-3:  # above 0 by rounding alone
            raise ValueError("an answer whose top_logprobs are no tokens with log-probabilities")
    return pairs
