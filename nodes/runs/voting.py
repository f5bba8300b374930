"""Votes that a browser sends: on a picture in a run's sample grid, on one that TDPO Taste has shown, or on an image
file in ComfyUI's output folder.

{"picture": {"run": "my run", "epoch": 10, "row": 0, "col": 2}, "liked": true}
{"picture": {"shown": "3f0c...a9.png"}, "liked": false}
{"winner": {"file": "ComfyUI_00001_.png"}, "loser": {"file": "fox/ComfyUI_00002_.png"}, "prompt": "a fox"}

Rows and columns count from 0. The prompt of a picture in a grid is known, that of a file may be given.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from comfy_tdpo.counts import number_of
from comfy_tdpo.resolution import sides
from comfy_tdpo.tastes.folder import TasteFolder
from comfy_tdpo.tastes.votes import Pair, Thumb, check_file

from ...trainer.plots.image_grid import image_in_grid
from ...trainer.run import RunFolder
from ...trainer.terminal.image_files import read_image
from .registry import Fields, Runs
from .tastes import Tastes

Picture = tuple[Tensor, str]  # (3, H, W) in [0, 1], and its prompt, which may be empty


def parsed(body: str) -> Fields:
    """A vote's fields; ValueError if the body is not a JSON object."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got a vote that is not JSON ({error}); expected an object") from error
    if not isinstance(fields, dict):
        raise ValueError(f"got the vote {body[:60]!r}; expected an object with picture and liked, or winner and loser")
    return fields


def add_vote(tastes: Tastes, runs: Runs, shown: TasteFolder, name: str, fields: Fields) -> Fields:
    """Add one vote to the taste of that name, made if there is none; returns the taste's status.

    shown: what has the pictures that TDPO Taste has shown.

    Raises:
        ValueError: the vote is malformed, or names a picture that does not exist; nothing has been added.
    """
    prompt = fields.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"got the prompt {prompt!r:.60}; expected text")
    if "picture" in fields:
        vote_on(tastes, name, picture_of(runs, shown, fields["picture"], prompt), fields.get("liked"))
    else:
        vote_between(tastes, name, *(picture_of(runs, shown, fields.get(key), prompt) for key in ("winner", "loser")))
    return tastes.status(name)


def vote_on(tastes: Tastes, name: str, picture: Picture, liked: Any) -> TasteFolder:
    """Add a vote on one picture; liked is true or false."""
    if not isinstance(liked, bool):
        raise ValueError(f"got liked {liked!r:.60}; expected true or false")
    pixels, prompt = picture
    taste = tastes.made(name, pixels)
    taste.append([Thumb(taste.keep(pixels), float(liked), prompt)])
    return taste


def vote_between(tastes: Tastes, name: str, winner: Picture, loser: Picture) -> TasteFolder:
    """Add a vote for one picture and against another."""
    if winner[0].shape == loser[0].shape and bool((winner[0] == loser[0]).all()):
        raise ValueError("got the same picture as winner and loser; expected two different ones")
    taste = tastes.made(name, winner[0])
    taste.append([Pair(taste.keep(winner[0]), taste.keep(loser[0]), winner[1])])
    return taste


# --- pictures ---------------------------------------------------------------------------------------------------------


def picture_of(runs: Runs, shown: TasteFolder, place: Any, prompt: str = "") -> Picture:
    """The picture that a browser means."""
    if isinstance(place, dict) and isinstance(place.get("shown"), str):
        return picture_shown(shown, place["shown"]), prompt
    if isinstance(place, dict) and isinstance(place.get("file"), str):
        return read_image(file_in(runs.root.parent, place["file"]))[0], prompt
    if isinstance(place, dict) and isinstance(place.get("run"), str):
        epoch, row, col = (place.get(key) for key in ("epoch", "row", "col"))
        if type(epoch) is int and type(row) is int and type(col) is int:
            return picture_in_grid(runs.find(place["run"]), epoch, row, col)
    raise ValueError(
        f"got the picture {str(place)[:100]}; expected run, epoch, row and col of a sample grid, a shown picture, "
        "or a file in ComfyUI's output folder"
    )


def picture_in_grid(run: RunFolder, epoch: int, row: int, col: int) -> Picture:
    """A picture in the sample grid that `run` drew after `epoch`, and its prompt."""
    prompts, path = run.grid_prompts(run.config), run.sample_grid(epoch)
    if not path.is_file():
        raise ValueError(
            f"got epoch {epoch} of run {run.path.name!r}, which has no sample grid; expected an epoch that has one"
        )
    index, pixels = image_in_grid(path, len(prompts), row, col)
    resolution = run.config.drawn_with["resolution"]
    if (pixels.shape[2], pixels.shape[1]) != sides(resolution):
        raise ValueError(
            f"got the sample grid of epoch {epoch}, which does not have the "
            f"{number_of(len(prompts), 'image')} of {resolution} pixels that the run draws now; expected "
            "one that has: vote on a newer one"
        )
    return pixels, prompts[index]


def picture_shown(shown: TasteFolder, name: str) -> Tensor:
    """A picture that TDPO Taste has shown."""
    try:
        return shown.picture(check_file(name))
    except ValueError as error:
        raise ValueError(
            f"got picture {name[:100]!r}, which is not shown any more; expected one that TDPO Taste shows: press Run "
            "to show the pictures again"
        ) from error


def file_in(output: Path, name: str) -> Path:
    """The path of a file in ComfyUI's output folder; ValueError if it would be outside."""
    path = (output / name).resolve() if "\0" not in name else output
    if not path.is_relative_to(output.resolve()) or not path.is_file():
        raise ValueError(f"got file {name[:100]!r}; expected an image in ComfyUI's output folder")
    return path
