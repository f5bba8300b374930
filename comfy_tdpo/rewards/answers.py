"""Checking what a reward returns: one finite number per image. Errors name the reward and what it returned.

A user's function may also return (scores, info), as in DDPO, TRL and flow_grpo. Its scores may be a tensor on any
device, an array or a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RewardError(RuntimeError):
    """A reward model failed during training; the message names it."""


def checked(name: str, scores: Tensor, images: Tensor) -> Tensor:
    """`scores` as float32. Raises RewardError if they are not one finite number per image."""
    import torch

    if scores.shape != images.shape[:1]:
        raise RewardError(
            f"reward {name!r} returned shape {tuple(scores.shape)}; expected one score per image, ({len(images)},)"
        )
    if scores.device != images.device:
        raise RewardError(
            f"reward {name!r} returned scores on {scores.device}; expected {images.device}, where the images are"
        )
    if scores.is_complex() or scores.layout != torch.strided:
        raise RewardError(f"reward {name!r} returned {scores.dtype} ({scores.layout}); expected plain real numbers")
    scores = scores.float()
    if not torch.isfinite(scores).all():
        raise RewardError(f"reward {name!r} returned a score that is not finite: {scores.tolist()}")
    return scores


def scores_of(name: str, answer: Any, images: Tensor) -> Tensor:
    """The numbers in what the function `name` returned, on the images' device. Raises RewardError if it has none.

    A tensor keeps its gradient. `checked` verifies the count and that all are finite.
    """
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
        answer = answer[0]  # DDPO's (scores, info)
    numbers = _as_tensor(answer, images.device)
    if numbers is None:
        expected = f"one number for each image, {len(images)} in all, as a tensor, an array or a list"
        raise RewardError(f"reward {name!r} returned {_described(answer)}; expected {expected}{_remedy(answer)}")
    return numbers


def _as_tensor(answer: Any, device: torch.device) -> Tensor | None:
    import numpy as np
    import torch

    if isinstance(answer, (list, tuple)):
        numbers = [_number(item) for item in answer]
        found = [_moved(number, device) for number in numbers if number is not None]
        if len(found) < len(numbers):
            return None
        return torch.stack(found) if found else torch.empty(0, device=device)
    if isinstance(answer, torch.Tensor):
        return _moved(answer, device)
    if hasattr(answer, "__array__"):
        array = np.asarray(answer)
        return _moved(torch.as_tensor(array.astype(np.float64)), device) if array.dtype.kind in "biuf" else None
    number = _number(answer)
    return None if number is None else _moved(number, device)


def _moved(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers` on `device`, as float32 if they are float64: Apple's GPUs have no float64."""
    import torch

    return (numbers.float() if numbers.dtype == torch.float64 else numbers).to(device)


def _number(item: Any) -> Tensor | None:
    """A single number of any type as a 0-dimensional tensor; None if `item` is not one."""
    import numpy as np
    import torch

    if isinstance(item, torch.Tensor):
        return item.reshape(()) if item.numel() == 1 else None
    if isinstance(item, (np.ndarray, np.generic)):
        item = item.item() if item.size == 1 and item.dtype.kind in "biuf" else None
    return torch.tensor(float(item), dtype=torch.float64) if hasattr(item, "__float__") else None


def _described(answer: Any) -> str:
    kind = type(answer).__name__
    if answer is None:
        return "None"
    if isinstance(answer, dict):
        return f"a dict with the keys {', '.join(map(repr, answer)) or '(none)'}"[:200]
    if isinstance(answer, (list, tuple)):
        return f"a {kind} of {', '.join(sorted({type(item).__name__ for item in answer}))}"
    if hasattr(answer, "dtype"):
        return f"a {kind} of {answer.dtype}"
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _remedy(answer: Any) -> str:
    if answer is None:
        return "; does it lack a `return`?"
    if hasattr(answer, "__await__"):
        if hasattr(answer, "close"):
            answer.close()  # prevents Python's warning that it was never awaited
        return "; write `def` instead of `async def`, or run it with asyncio.run"
    if isinstance(answer, dict):
        return "; return the entry that is the reward"
    if hasattr(answer, "__next__"):
        return "; return list(...) of it, or `return` instead of `yield`"
    if isinstance(answer, tuple):
        return ", or such numbers and a dict: (scores, info)"
    return ""
