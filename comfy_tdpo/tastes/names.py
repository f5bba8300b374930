"""Names of tastes as rewards: `taste:NAME`. The folder or file behind a name is given apart, like a reward's weights.

So a name never holds a path, and names in metrics and LoRA files tell nothing of the folders of a machine.
"""

import re
from pathlib import Path

PREFIX = "taste:"
VOTES = "votes.jsonl"
FITTED = ".safetensors"

WORLD_SIDE = 64  # pixels of Shapes' pictures

PLAIN_NAME = re.compile(r"[^\W_]([\w .+-]*[\w+-])?")


def is_taste(name: str) -> bool:
    return name.startswith(PREFIX)


def check_taste(name: str) -> None:
    """Raise ValueError if `name`, which begins with the prefix, is not followed by a plain name."""
    if not PLAIN_NAME.fullmatch(name.removeprefix(PREFIX)):
        raise ValueError(
            f"got reward {name[:100]!r}; expected taste:NAME with letters, digits, spaces and . _ - + in the name: say "
            "where its folder is by reward_weights"
        )


def name_of(path: Path) -> str:
    """The name, as a reward, of the taste in the folder or fitted file `path`."""
    stem = path.stem if path.suffix == FITTED else path.name
    plain = re.sub(r"[^\w .+-]", "-", stem).strip(" ._-")
    return PREFIX + (plain or "unnamed")


def usual_encoder(height: int, width: int) -> str:
    """The encoder of a new taste whose first picture has this size: that of Shapes for its tiny pictures, else CLIP."""
    return "shapes-aesthetic" if height == width == WORLD_SIDE else "aesthetic"
