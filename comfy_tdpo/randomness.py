"""Random numbers from coordinates.

Every generator is seeded from where its numbers are used, such as (run seed, "noise", epoch, sample). A resumed run
therefore repeats exactly, the number of micro-batches makes no difference, and no global generator's state has to be
saved, guessed or shared with another thread.
"""

import hashlib

import torch

Coordinates = tuple[int | str, ...]


def derive_seed(*coordinates: int | str) -> int:
    """A 63-bit seed from `coordinates`, the same on every machine."""
    digest = hashlib.sha256(repr(coordinates).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_at(*coordinates: int | str) -> torch.Generator:
    """A generator on the CPU, so that its numbers do not depend on the device that uses them."""
    return torch.Generator().manual_seed(derive_seed(*coordinates))
