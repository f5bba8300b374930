"""The tastes in ComfyUI's output folder: their names, their votes, and the reward that each is."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.counts import number_of
from comfy_tdpo.tastes.folder import TasteFolder, file_of
from comfy_tdpo.tastes.names import PREFIX, VOTES, usual_encoder
from comfy_tdpo.tastes.votes import Pair, Thumb, has_contrast

from .combos import AUTO
from .names import check_taste_name
from .registry import Fields, Runs
from .reward_choice import RewardChoice

FOLDER = "tdpo_tastes"


class NoSuchTaste(ValueError):
    """A valid name that no taste has."""


@dataclass(frozen=True)
class Tastes:
    """All tastes; `root` is the folder that contains them."""

    root: Path

    def folder(self, name: object) -> TasteFolder:
        """The folder of a taste, whether it exists or not."""
        return TasteFolder(self.root / check_taste_name(name))

    def find(self, name: object) -> TasteFolder:
        """The taste of that name; NoSuchTaste if there is none, ValueError if the name is invalid."""
        taste = self.folder(name)
        if not taste.exists:
            raise NoSuchTaste(
                f"got taste {name!r}, which has no votes; expected one of those in output/{FOLDER}: connect pictures "
                "to TDPO Taste, press Run, and click on those that you like and dislike"
            )
        return taste

    def status(self, name: str) -> Fields:
        """How many votes of each kind the taste has, and its encoder."""
        taste = self.find(name)
        votes = taste.counted()
        liked = [vote.liked for vote in votes if isinstance(vote, Thumb)]
        return {
            "name": name,
            "encoder": taste.encoder,
            "votes": len(votes),
            "liked": liked.count(1.0),
            "disliked": liked.count(0.0),
            "pairs": sum(isinstance(vote, Pair) for vote in votes),
        }

    def state(self, name: str) -> str:
        """A text that changes with every vote."""
        votes = self.folder(name).path / VOTES
        return hashlib.sha256(votes.read_bytes()).hexdigest() if votes.is_file() else ""

    def show(self, name: str, files: list[str], needed: int, shown: TasteFolder) -> Fields:
        """The ballot of a taste that needs so many votes, with the pictures in these files of `shown`.

        It is kept if it has pictures: a node that shows none leaves those of another one with this taste.
        """
        about = json.dumps({"needed": needed, "files": files}) + "\n"
        if files:
            write_atomically(self._ballot(name, shown), lambda file: file.write_text(about, encoding="utf-8"))
        return self._filled(name, needed, files)

    def ballot(self, name: str, shown: TasteFolder) -> Fields:
        """The status of the taste, how many votes it needs, and the votes on the pictures that it has shown last; if
        it has shown none, only that there are no pictures."""
        path = self._ballot(name, shown)
        if not path.is_file():
            return {"pictures": []}
        kept = json.loads(path.read_text(encoding="utf-8"))
        return self._filled(name, kept["needed"], kept["files"])

    def _filled(self, name: str, needed: int, files: list[str]) -> Fields:
        votes = {vote.image: vote.liked for vote in self.find(name).counted() if isinstance(vote, Thumb)}
        pictures = [{"file": file, "liked": votes.get(file)} for file in files]
        return self.status(name) | {"needed": needed, "pictures": pictures}

    def _ballot(self, name: str, shown: TasteFolder) -> Path:
        return shown.path / "ballots" / f"{check_taste_name(name)}.json"

    def is_enough(self, name: str, needed: int, is_shown: bool) -> bool:
        """Whether the taste has so many votes, some for and some against.

        Raises:
            ValueError: it has too few, and no pictures are shown on which its user could vote.
        """
        votes = self.find(name).counted()
        if is_shown:
            return len(votes) >= needed and has_contrast(votes)
        if len(votes) < needed:
            raise ValueError(
                f"got {number_of(len(votes), 'vote')} in taste {name!r}; expected at least {needed}: connect pictures "
                "to TDPO Taste and click on those that you like and dislike, or lower votes_needed"
            )
        return True

    def vote(
        self,
        name: object,
        liked: list[Tensor],
        disliked: list[Tensor],
        encoder: str = AUTO,
        shown: Sequence[Tensor] = (),
    ) -> TasteFolder:
        """The taste of that name, with votes on the liked and disliked pictures, (3, H, W); made if there are any, or
        if some are shown to be voted on."""
        pictures = [*liked, *disliked]
        if not pictures and not shown:
            return self.find(name)
        both = {file_of(picture) for picture in liked} & {file_of(picture) for picture in disliked}
        if both:
            raise ValueError(
                f"got {len(both)} of the pictures both as liked and as disliked; expected each as one of the two: "
                "remove it from one input"
            )
        taste = self.made(name, [*pictures, *shown][0], encoder)
        taste.append([Thumb(taste.keep(picture), float(i < len(liked))) for i, picture in enumerate(pictures)])
        return taste

    def made(self, name: object, picture: Tensor, encoder: str = AUTO) -> TasteFolder:
        """The taste of that name; if there is none, a new one, whose encoder suits the picture, (3, H, W)."""
        taste = self.folder(name)
        if encoder == AUTO:
            encoder = taste.encoder if taste.exists else usual_encoder(*picture.shape[-2:])
        return TasteFolder.create(taste.path, encoder)


def tastes_beside(runs: Runs) -> Tastes:
    """The tastes in the output folder that holds `runs` too."""
    return Tastes(runs.root.parent / FOLDER)


def with_taste(choice: RewardChoice, name: str, taste: TasteFolder, weight: float) -> RewardChoice:
    """`choice` and a taste."""
    return choice.with_reward(PREFIX + name, weight, str(taste.path))
