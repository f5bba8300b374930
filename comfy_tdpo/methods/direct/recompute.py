"""Gradient checkpointing of any network: its blocks compute their activations again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ...blocks import blocks_of

recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing here draws random numbers


@contextmanager
def recomputing(networks: list[nn.Module]) -> Iterator[None]:
    """Inside the block, the forward passes of `networks` keep only what enters their blocks.

    What was computed inside may be back-propagated afterwards too.
    """
    # rewards of a sum may share their encoder
    blocks = list(dict.fromkeys(block for network in networks for block in blocks_of(network)))
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(recomputed, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:  # its class has it
                del block.forward
            else:
                block.forward = forward
