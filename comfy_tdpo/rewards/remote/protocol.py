"""What a reward service is asked and answers, for both sides. docs/rewards.md describes it for other servers.

A request is a POST whose body is a safetensors file of two tensors: `images`, float (B, 3, H, W) in [0, 1], and
`prompts`, the bytes of a JSON list of B strings. So the service gets the very numbers that a reward in this process
would get, and its scores are the same to the bit.

The answer is JSON: {"batch": the SHA-256 of the body, "scores": [B numbers]}. The digest shows that the scores are of
this batch, and that it arrived whole. With another status than 200 it is {"error": a sentence}; 4xx says that asking
again is useless.
"""

import hashlib
import json
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ...counts import number_of

PORT = 8765
LARGEST_BODY = 2**28  # bytes; larger batches are sent in parts
HEADER = 2**20  # bytes of a body that are left for its header and prompts
LARGEST_SCORE = torch.finfo(torch.float32).max


def packed(images: Tensor, prompts: list[str]) -> bytes:
    """The body of a request."""
    text = torch.frombuffer(bytearray(json.dumps(prompts).encode()), dtype=torch.uint8)
    return safetensors.torch.save({"images": images.detach().cpu().contiguous(), "prompts": text})


def unpacked(body: bytes) -> tuple[Tensor, list[str]]:
    """The images and prompts in a body; ValueError, with a sentence, if it is not a request."""
    try:
        tensors = safetensors.torch.load(body)
        images, prompts = tensors["images"], json.loads(bytes(tensors["prompts"].tolist()))
    except Exception as error:  # what is no request may end in any exception
        raise ValueError(
            f"got a body that is no request ({type(error).__name__}: {error}); expected a safetensors file of images, "
            "float (B, 3, H, W), and prompts, the bytes of a JSON list of B strings"
        ) from error
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise ValueError(f"got images {images.dtype} {tuple(images.shape)}; expected float (B, 3, H, W)")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("got prompts that are no list of strings; expected one string for each image")
    if len(prompts) != len(images):
        raise ValueError(
            f"got {number_of(len(prompts), 'prompt')} for {number_of(len(images), 'image')}; expected one for each"
        )
    if not torch.isfinite(images).all():
        raise ValueError("got images that are not finite; expected numbers from 0 to 1")
    return images, prompts


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def answer(body: bytes, scores: list[float]) -> bytes:
    return json.dumps({"batch": digest(body), "scores": scores}).encode()


def scores_in(text: bytes, body: bytes, count: int) -> list[float]:
    """The scores in the answer to `body`, which has `count` images; ValueError, with the reason, if it is no answer."""
    found = json_object(text)
    if found.get("batch") != digest(body):
        raise ValueError("an answer for another batch")
    scores = found.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        number = number_of(len(scores), "score") if isinstance(scores, list) else "no list of scores"
        raise ValueError(f"{number}, but {count} expected")
    if not all(is_number(score) and abs(score) <= LARGEST_SCORE for score in scores):  # NaN is not <= anything
        raise ValueError("a score that is no finite number")
    return scores


def json_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`; ValueError if there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("an answer that is no JSON object")
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
