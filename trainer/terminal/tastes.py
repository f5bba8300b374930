"""Tastes on the command line: taste:PATH, where PATH is a taste's folder, a fitted file, or a name in TASTES.

The settings keep the name and, apart from it, the path: `taste:tastes/mine` becomes the reward `taste:mine` and
`reward_weights taste:mine=/.../tastes/mine`.
"""

import os
from pathlib import Path
from typing import Any

from comfy_tdpo.tastes.names import PREFIX, VOTES, is_taste, name_of
from comfy_tdpo.user_files import user_path

from ..config.parsing import named_values, split_names

TASTES = Path("tastes")
_SECTIONS = {"overoptimisation": "reward", "critic": "encoder"}  # settings that name one reward


def taste_path(text: str) -> Path:
    """The folder or file of a taste that a user means by a path, or by a name in TASTES."""
    path = user_path(text)
    if path.name == VOTES:
        return path.parent
    is_name = not {"/", os.sep} & set(text)
    return TASTES / path if is_name and not path.exists() else path


class Paths:
    """Gives tastes their names, and remembers their paths, as text by name."""

    def __init__(self, known: dict[str, str]):
        self.known = known

    def named(self, text: Any) -> Any:
        """The name of the reward in `text`, without the path of a taste; anything else stays as it is.

        Raises:
            ValueError: there is no such taste, or another one has the same name.
        """
        if not isinstance(text, str) or not is_taste(text) or text in self.known:
            return text
        path = taste_path(text.removeprefix(PREFIX))
        if not path.exists():
            raise ValueError(
                f"got reward {text!r}, but '{path}' does not exist; expected the folder of a taste: check the path, or "
                f"make one with: taste {path} --liked FOLDER --disliked FOLDER"
            )
        name, path = name_of(path.absolute()), path.absolute()
        if self.known.setdefault(name, str(path)) != str(path):
            raise ValueError(
                f"got two tastes called {name!r}, '{path}' and '{self.known[name]}'; expected different names: rename "
                "one of the folders"
            )
        return name


def with_named_tastes(values: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as given on the command line, with the paths of tastes in `reward_weights`."""
    given = values.get("reward_weights", "")
    paths = Paths(named_values(given) if isinstance(given, str) else dict(given))
    before, named = dict(paths.known), dict(values)
    if "rewards" in values:
        named["rewards"] = {paths.named(name): weight for name, weight in values["rewards"].items()}
    for key in ("eval_rewards", "guards"):
        if key in values:
            named[key] = [paths.named(name) for name in split_names(values[key])]
    for section, key in _SECTIONS.items():
        if key in values.get(section, {}):
            named[section] = values[section] | {key: paths.named(values[section][key])}
    if PREFIX in str(values.get("reward_scales", "")):
        named["reward_scales"] = {paths.named(k): v for k, v in named_values(values["reward_scales"]).items()}
    return named if paths.known == before else named | {"reward_weights": paths.known}
