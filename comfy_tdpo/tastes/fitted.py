"""A fitted taste as one file: the head, the encoder's name and the votes' digest. No pictures and no votes are in it.

A run keeps such a copy, so that it resumes with exactly the taste it started with, however many votes follow.
"""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..tensor_files import TensorFile, write_tensors
from .head import Head
from .votes import Vote, to_line


@dataclass(frozen=True)
class Fitted:
    """head: what scores; encoder: the reward whose encoder it reads through; votes: how many it was fitted to; digest:
    of these votes."""

    head: Head
    encoder: str
    votes: int
    digest: str

    def save(self, path: Path) -> None:
        metadata = {"encoder": self.encoder, "votes": str(self.votes), "digest": self.digest}
        write_tensors(path, {field.name: getattr(self.head, field.name) for field in fields(Head)}, metadata)

    @property
    def fingerprint(self) -> str:
        """A digest of everything that its scores depend on."""
        digest = hashlib.sha256(self.encoder.encode())
        for field in fields(Head):
            digest.update(getattr(self.head, field.name).contiguous().numpy().tobytes())
        return digest.hexdigest()


def digest_of(votes: list[Vote]) -> str:
    """A digest of the votes that count, as sorted by `counted`; prompts are not read, and so are left out."""
    plain = [to_line(type(vote)(*list(vars(vote).values())[:2])) for vote in votes]
    return hashlib.sha256("\n".join(plain).encode()).hexdigest()


def read_fitted(path: Path) -> Fitted:
    """The fitted taste in the file `path`; ValueError if it is not one."""
    try:
        file = TensorFile(path)
        head = Head(**{field.name: file[field.name].double().clone() for field in fields(Head)})
        about = file.metadata
        fitted = Fitted(head, about["encoder"], int(about["votes"]), about["digest"])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"got '{path}' as a taste, which cannot be read ({error}); expected the folder of a taste, or a fitted "
            "taste as runs keep them: check the path, or copy the file again"
        ) from error
    _check(path, head)
    return fitted


def _check(path: Path, head: Head) -> None:
    """Raise ValueError for shapes that do not fit together and for numbers that are not finite."""
    D = head.center.numel()
    expected = {"center": (D,), "scale": (), "mean": (D + 1,), "covariance": (D + 1, D + 1), "strength": ()}
    for name, shape in expected.items():
        tensor = getattr(head, name)
        if tuple(tensor.shape) != shape or not torch.isfinite(tensor).all():
            raise ValueError(
                f"got '{path}' as a taste, whose {name} is {tuple(tensor.shape)} or not finite; expected {shape}: copy "
                "the file again"
            )
