"""Votes, and how each is written as a line of JSON.

{"image": "3f...a9.png", "liked": true, "prompt": "a red fox"}           one picture; liked is true, false, or a number
                                                                        between 0 and 1 for a rating
{"winner": "3f...a9.png", "loser": "07...c1.png", "prompt": "a fox"}     a pair

Pictures are files in the taste's folder of images. The prompt may be missing, and other keys are ignored.
"""

import json
from dataclasses import dataclass
from typing import Any

EXPECTED = 'expected {"image": FILE, "liked": true or false} or {"winner": FILE, "loser": FILE}'


@dataclass(frozen=True)
class Thumb:
    """A vote on one picture; liked is 1 for a liked one, 0 for a disliked one, or between for a rating."""

    image: str
    liked: float
    prompt: str = ""

    @property
    def images(self) -> tuple[str, ...]:
        return (self.image,)


@dataclass(frozen=True)
class Pair:
    """A vote between two pictures."""

    winner: str
    loser: str
    prompt: str = ""

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(sorted((self.winner, self.loser)))


Vote = Thumb | Pair


def to_line(vote: Vote) -> str:
    """The vote as JSON without a line break."""
    if isinstance(vote, Pair):
        plain: dict[str, Any] = {"winner": vote.winner, "loser": vote.loser}
    else:
        plain = {"image": vote.image, "liked": bool(vote.liked) if vote.liked in (0, 1) else vote.liked}
    return json.dumps(plain | ({"prompt": vote.prompt} if vote.prompt else {}), ensure_ascii=False)


def from_line(line: str) -> Vote | None:
    """The vote in a line; None if the line was cut off in mid-write and so is no JSON.

    Raises:
        ValueError: it is JSON, but not a vote.
    """
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(plain, dict):
        raise ValueError(f"got {line[:80]!r}; {EXPECTED}")
    prompt = plain.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"got the prompt {prompt!r:.60}; expected text")
    if "image" in plain:
        return Thumb(check_file(plain["image"]), _liked(plain.get("liked")), prompt)
    return _pair(check_file(plain.get("winner")), check_file(plain.get("loser")), prompt)


def _pair(winner: str, loser: str, prompt: str) -> Pair:
    if winner == loser:
        raise ValueError(f"got {winner!r} as both winner and loser; expected two different pictures")
    return Pair(winner, loser, prompt)


def _liked(value: Any) -> float:
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"got liked {value!r:.60}; expected true, false or a number from 0 to 1")


def check_file(name: Any) -> str:
    """`name`, if it is that of a file in a folder, and not a path; ValueError otherwise."""
    if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set('/\\:\0"\n'):
        raise ValueError(f"got {name!r:.80} as a picture; {EXPECTED}, where FILE is the name of a file in images")
    return name


def has_contrast(votes: list[Vote]) -> bool:
    """Whether a taste can learn from the votes: there is a pair, or pictures are not all liked alike."""
    liked = {vote.liked for vote in votes if isinstance(vote, Thumb)}
    return len(liked) > 1 or any(isinstance(vote, Pair) for vote in votes)


def counted(votes: list[Vote]) -> list[Vote]:
    """The votes that count, sorted: of several on the same picture or pair only the last, so that people can change
    their minds."""
    last = {vote.images: vote for vote in votes}
    return [last[images] for images in sorted(last)]
