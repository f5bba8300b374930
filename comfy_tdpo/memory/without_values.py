"""Tensors without values, whose bytes are what a GPU would hold.

With fake tensors, nothing is computed and no GPU is needed. Two things that CPUs do otherwise are as on CUDA: autocast
normalises in float32, and attention keeps no matrix of weights. What would be computed is counted too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .. import policy as policies
from ..rewards import pixels
from .counting import Held


@contextmanager
def counted(fake: bool = True) -> Iterator[Held]:
    """Inside the block, tensors are counted; if they are `fake`, they have no values."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(),
        Held() as held,
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(F, "group_norm", in_float32(F.group_norm)),
        patch.object(F, "layer_norm", in_float32(F.layer_norm)),
        patch.object(policies, "make_process", with_values(policies.make_process)),
        patch.object(nn.Module, "_apply", applied),
    ):
        pixels._windows.cache_clear()
        try:
            yield held
        finally:
            pixels._windows.cache_clear()  # tensors without values are of no use to others


def flops_of(work: Callable[[], Any]) -> int:
    """The floating-point operations of the matrix products and convolutions in `work`; a multiply-add is two."""
    aten = torch.ops.aten
    cpus_attention: dict[Any, Any] = {  # which torch does not count by itself; given the shapes of its arguments
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, **named: sdpa_flop_count(*args[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *args, **named: sdpa_backward_flop_count(
            *args[:4]
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=cpus_attention) as counter:
        work()
    return counter.get_total_flops()


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *more: Any, **named: Any) -> Tensor:
    """Without a matrix of weights, as on a GPU; but texts, which are masked, are encoded without gradient."""
    if attn_mask is not None or named.get("is_causal"):
        return attention_of_torch(query, key, value, attn_mask, *more, **named)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


attention_of_torch = F.scaled_dot_product_attention


def in_float32(norm: Callable) -> Callable:
    """CUDA's autocast normalises in float32, and CPU's in the dtype of the input."""

    def normed(input: Tensor, *sizes: Any, **named: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return norm(input, *sizes, **named)
        cast = [part.float() if isinstance(part, Tensor) else part for part in sizes]
        return norm(input.float(), *cast, **{k: v.float() if isinstance(v, Tensor) else v for k, v in named.items()})

    return normed


def with_values(make: Callable) -> Callable:
    """The same function, whose tensors have values: a process's tables decide which steps there are."""

    def made(*args: Any) -> Any:
        with unset_fake_temporarily():
            return make(*args)

    return made


def applied(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`module` with other tensors, as `nn.Module.to` makes them; torch's own cannot exchange fake ones."""
    for child in module.children() if recurse else ():
        applied(child, change)
    for name, weight in module._parameters.items():
        if weight is not None:
            module._parameters[name] = nn.Parameter(change(weight.detach()), weight.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module
