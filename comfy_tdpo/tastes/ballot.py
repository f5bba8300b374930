"""From the votes of a taste to tensors: pictures are embedded one at a time, and each only once.

One at a time, since sizes differ, and so that an embedding does not depend on the pictures beside it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..atomic_files import write_atomically
from ..counts import number_of
from ..tensor_files import TensorFile, write_tensors
from .folder import EMBEDDINGS, TasteFolder
from .head import Ballot
from .votes import Pair, Thumb, Vote, has_contrast

Embed = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) -> unit embeddings (B, D)


def embedded(taste: TasteFolder, votes: list[Vote], embed: Embed, kind: str) -> dict[str, Tensor]:
    """The embeddings, (D,), of the pictures in `votes`, by name; new ones are kept in the taste's folder.

    kind: names the encoder and its precision, and so the file in which they are kept.
    """
    path = taste.path / EMBEDDINGS / f"{kind}.safetensors"
    known = _kept(path)
    names = sorted({name for vote in votes for name in vote.images})
    missing = [name for name in names if name not in known]
    with torch.no_grad():
        known |= {name: embed(taste.picture(name)[None])[0].float().cpu() for name in missing}
    if missing:
        write_atomically(path, lambda file: write_tensors(file, known))
    return {name: known[name] for name in names}


def _kept(path: Path) -> dict[str, Tensor]:
    """The embeddings in a file; none if it is missing or damaged, as they can be computed again."""
    try:
        file = TensorFile(path)
        return {name: file[name].clone() for name in file.shapes}
    except (OSError, ValueError):
        return {}


def ballot_of(votes: list[Vote], embeds: dict[str, Tensor], path: Path) -> Ballot:
    """The votes of the taste at `path` as tensors.

    Raises:
        ValueError: they contrast nothing, so that nothing could be learned from them.
    """
    thumbs = [vote for vote in votes if isinstance(vote, Thumb)]
    pairs = [vote for vote in votes if isinstance(vote, Pair)]
    if not has_contrast(votes):
        raise ValueError(
            f"got the taste '{path}' with {number_of(len(thumbs), 'vote')}{_alike(thumbs)}; expected a liked picture "
            "and a disliked one, or a pair: a taste learns from contrast, so vote on more pictures"
        )
    rows = {name: embeds[name].double() for vote in votes for name in vote.images}
    empty = next(iter(rows.values())).new_empty(0, len(next(iter(rows.values()))))

    def stacked(names: list[str]) -> Tensor:
        return torch.stack([rows[name] for name in names]) if names else empty

    return Ballot(
        singles=stacked([vote.image for vote in thumbs]),
        liked=torch.tensor([vote.liked for vote in thumbs], dtype=torch.float64),
        winners=stacked([vote.winner for vote in pairs]),
        losers=stacked([vote.loser for vote in pairs]),
    )


def _alike(thumbs: list[Thumb]) -> str:
    if not thumbs:
        return ""
    return {1.0: ", all of liked pictures", 0.0: ", all of disliked pictures"}.get(thumbs[0].liked, ", all the same")
