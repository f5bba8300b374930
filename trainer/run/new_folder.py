"""The folder of a new run: choosing it, checking that it is free, and removing it if the run never starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from comfy_tdpo.user_files import check_name

from .paths import CONFIG, GRID_PROMPTS, LOCK, MODEL, PROMPTS, holds_run

RUNS = Path("runs")
# Files of a run killed during its creation, and files that file managers and file systems put into every folder.
_IGNORED = {PROMPTS, GRID_PROMPTS, LOCK, ".ds_store", ".localized", ".directory", "thumbs.db", "desktop.ini"}
_IGNORED |= {"lost+found", "@eadir", ".spotlight-v100", ".fseventsd"}


@contextmanager
def new_folder(wanted: Path | None) -> Iterator[Path]:
    """Create the folder of a new run; at the end of the block, remove it and its new parents if they are empty.

    Args:
        wanted: that folder; None: one in RUNS, named by date and time.

    Raises:
        ValueError: it cannot be created, or is not free.
    """
    folder, new = make_folder(wanted)
    try:
        yield folder
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()


def make_folder(wanted: Path | None) -> tuple[Path, list[Path]]:
    """Create the folder; returns it, and which of it and its parents did not exist before."""
    for folder in [wanted] if wanted else _dated():
        if wanted is None and os.path.lexists(folder):
            continue  # another run started in the same second
        check_free(folder)
        try:
            new = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=wanted is not None)
        except FileExistsError:
            if wanted is None and folder.is_dir():
                continue  # as above, since the check
            raise _not_made(folder, "something else was created there meanwhile") from None
        except OSError as error:
            raise _not_made(folder, error.strerror) from error
        return folder, new
    raise AssertionError("there is always another number")


def _dated() -> Iterator[Path]:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return (RUNS / (stamp if number == 1 else f"{stamp}-{number}") for number in count(1))


def check_free(folder: Path) -> None:
    """Raise ValueError if a new run cannot be created in `folder`."""
    check_name(folder.absolute())
    try:
        _check_way(folder)
        if not folder.is_dir():
            return
        if (folder / CONFIG).exists():
            raise ValueError(f"run directory {str(folder)!r} holds a run; resume it with --resume, or choose another")
        foreign = sorted(path.name for path in folder.iterdir() if _is_foreign(path))
        if foreign:
            raise ValueError(
                f"got run directory {str(folder)!r}, which holds {foreign[0]!r}; expected a new or empty folder: "
                "choose another"
            )
    except (OSError, RuntimeError) as error:  # no permission, too long a name, or circular links
        raise _not_made(folder, getattr(error, "strerror", None) or str(error)) from error


def _check_way(folder: Path) -> None:
    """Raise ValueError if a file or a broken link is in the way, or the folder would be inside another run."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            reason = f"{str(path)!r} is a link to {str(path.readlink())!r}, which does not exist"
            raise _not_made(folder, reason, "mount or create that, or choose another")
        if path.exists():
            if not path.is_dir():
                raise _not_made(folder, f"{str(path)!r} is a file")
            if not os.access(path, os.W_OK | os.X_OK):
                raise _not_made(folder, f"you have no permission to write to {str(path)!r}")
            break
    outer = next((path for path in folder.resolve().parents if holds_run(path)), None)
    if outer:
        raise ValueError(f"got run directory {str(folder)!r} inside the run {str(outer)!r}; choose one outside it")


def _is_foreign(path: Path) -> bool:
    if path.name == MODEL and path.is_dir() and not any(path.iterdir()):
        return False  # of a run killed during its creation
    return path.name.lower() not in _IGNORED and ".partial" not in path.name and not path.name.startswith("._")


def _not_made(folder: Path, reason: str | None, remedy: str = "choose another") -> ValueError:
    return ValueError(f"run directory {str(folder)!r} cannot be created: {reason}; {remedy}")
