"""The folder of a taste, from which nothing is ever deleted.

taste.json       the format and the encoder: the reward whose image encoder reads the pictures
votes.jsonl      one vote per line, see votes.py; lines are only ever appended
images/          the pictures that were voted on, each as a PNG named by its content
embeddings/      their embeddings: a cache, which is filled again if it is deleted

Pictures are float (3, H, W) in [0, 1] and are kept with 8 bits.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..atomic_files import write_atomically
from .names import VOTES
from .votes import Vote, counted, from_line, to_line

ABOUT, IMAGES, EMBEDDINGS, LOCK = "taste.json", "images", "embeddings", ".lock"
FORMAT = 1


class TasteFolder:
    """The taste in the folder `path`."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: Path, encoder: str) -> "TasteFolder":
        """The taste at `path`, made if there is none.

        Raises:
            ValueError: there is one with another encoder, or something else is there.
        """
        taste = cls(path)
        if not taste.exists:
            # whoever makes a taste locks it first
            if path.exists() and (not path.is_dir() or (_holds_files(path) and not (path / LOCK).exists())):
                raise _no_taste(path)
            path.mkdir(parents=True, exist_ok=True)
            with taste._locked():
                if not taste.exists:  # nobody else has made it meanwhile
                    if _holds_files(path):
                        raise _no_taste(path)
                    about = json.dumps({"format": FORMAT, "encoder": encoder}) + "\n"
                    write_atomically(path / ABOUT, lambda file: file.write_text(about, encoding="utf-8"))
        if taste.encoder != encoder:
            raise ValueError(
                f"got encoder {encoder!r} for the taste '{path}', which reads its pictures by {taste.encoder!r}; "
                "expected the same: leave the encoder out, or choose another name"
            )
        return taste

    @property
    def exists(self) -> bool:
        return (self.path / ABOUT).is_file()

    @property
    def encoder(self) -> str:
        """The name of the reward whose image encoder reads the pictures."""
        try:
            about = json.loads((self.path / ABOUT).read_text(encoding="utf-8"))
            version, encoder = about["format"], str(about["encoder"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"got '{self.path}' as a taste, whose {ABOUT} cannot be read ({error}); expected the folder of a "
                "taste: check the path, or restore that file"
            ) from error
        if version != FORMAT:
            raise ValueError(f"got the taste '{self.path}' in format {version!r}; expected {FORMAT}: update comfy_tdpo")
        return encoder

    # --- votes ------------------------------------------------------------------------------------------------------

    def votes(self) -> list[Vote]:
        """All votes in the order in which they were given; lines that were cut off in mid-write are left out."""
        return [vote for vote in self._lines() if vote is not None]

    def counted(self) -> list[Vote]:
        """The votes that count, sorted."""
        return counted(self.votes())

    def cut_off(self) -> int:
        """How many lines were cut off in mid-write."""
        return sum(vote is None for vote in self._lines())

    def append(self, votes: list[Vote]) -> int:
        """Add votes, safely on disk when this returns; those that repeat what the taste has are left out.

        Returns how many were added.
        """
        with self._locked():
            last = {vote.images: vote for vote in self.votes()}
            new = []
            for vote in votes:
                if last.get(vote.images) != vote:
                    new.append(vote)
                last[vote.images] = vote
            if new:
                with (self.path / VOTES).open("ab") as file:
                    torn = file.tell() > 0 and not (self.path / VOTES).read_bytes().endswith(b"\n")
                    lines = "".join(f"{to_line(vote)}\n" for vote in new)
                    file.write(b"\n" * torn + lines.encode())
                    file.flush()
                    os.fsync(file.fileno())
        return len(new)

    def _lines(self) -> Iterator[Vote | None]:
        path = self.path / VOTES
        try:
            lines = path.read_bytes().decode(errors="replace").split("\n") if path.exists() else []
        except OSError as error:
            raise ValueError(f"votes '{path}' cannot be read: {error.strerror}; check its permissions") from error
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield from_line(line)
            except ValueError as error:
                raise ValueError(f"votes '{path}', line {number}: {error}; correct or remove that line") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.path / LOCK):  # the browser, a graph and the command line may vote at the same time
            yield

    # --- pictures ---------------------------------------------------------------------------------------------------

    def keep(self, picture: Tensor) -> str:
        """Save a picture, unless the taste has it already; the name of its file."""
        path = self.path / IMAGES / file_of(picture)
        if not path.exists():
            write_atomically(path, Image.fromarray(_levels(picture)).save)
        return path.name

    def picture(self, name: str) -> Tensor:
        """A picture that was voted on, (3, H, W); ValueError if it is gone or damaged."""
        path = self.path / IMAGES / name
        try:
            with Image.open(path) as image:
                levels = np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"got a vote on '{path}', which cannot be read ({error}); expected a picture: restore it, or remove "
                f"its votes from {VOTES}"
            ) from error
        return torch.from_numpy(levels).permute(2, 0, 1).float() / 255


def file_of(picture: Tensor) -> str:
    """The name of a picture's file, which derives from its pixels."""
    levels = _levels(picture)
    return hashlib.sha256(repr(levels.shape).encode() + levels.tobytes()).hexdigest()[:32] + ".png"


def _levels(picture: Tensor) -> np.ndarray:
    """Levels of 8 bits, (H, W, 3)."""
    return (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()


def _holds_files(path: Path) -> bool:
    return any(file.name[0] != "." for file in path.iterdir())


def _no_taste(path: Path) -> ValueError:
    return ValueError(f"got '{path}', which is no taste; expected a new or empty folder: choose another name")
