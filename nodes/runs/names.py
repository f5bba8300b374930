"""Names of runs and of tastes: each is a valid folder name on every system, and cannot point outside their folder."""

import re

from comfy_tdpo.tastes.names import PLAIN_NAME

LONGEST = 80  # bytes; systems allow 255, and Windows about as many for a whole path
EXPECTED = (
    f"expected a name of 1 to {LONGEST} letters, digits, spaces and . _ - +, beginning with a letter or a digit and "
    "not ending in a dot or a space, such as 'my style 2'"
)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows devices


def check_run_name(name: str) -> str:
    """`name` itself; ValueError if it is not a valid run name."""
    if problem := problem_with(name):
        raise ValueError(problem)
    return name


def check_taste_name(name: object) -> str:
    """`name` itself; ValueError if it is not a valid name of a taste."""
    problem = problem_with(name, "taste") if isinstance(name, str) else f"got taste {name!r:.40}; {EXPECTED}"
    if problem:
        raise ValueError(problem)
    return str(name)


def problem_with(name: str, what: str = "run name") -> str:
    """Why `name` is not a valid name of a run, or of what `what` says; empty if it is."""
    if not PLAIN_NAME.fullmatch(name) or len(name.encode()) > LONGEST:
        return f"got {what} {_shown(name)}; {EXPECTED}"
    if _RESERVED.fullmatch(name):
        return f"got {what} {_shown(name)}, which Windows reserves for a device; {EXPECTED}"
    return ""


def _shown(name: str) -> str:
    return repr(name) if len(name) <= LONGEST else f"{name[:40]!r}... of {len(name)} characters"


def later_name(name: str, number: int) -> str:
    """The name of run `number` of those started as `name`: name, name-2, name-3."""
    return name if number == 1 else f"{name}-{number}"
