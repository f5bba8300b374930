"""The tastes of a run: it keeps fitted copies, and says when a taste has changed since it started.

Votes may follow at any time. A run that resumed with other votes would be another run, so it goes on with its copies.
"""

from pathlib import Path

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.counts import number_of
from comfy_tdpo.rewards.taste import Taste
from comfy_tdpo.tastes.fitted import digest_of, read_fitted
from comfy_tdpo.tastes.folder import TasteFolder
from comfy_tdpo.tastes.names import is_taste

from ..config import TrainConfig
from .paths import RunPaths


def weights_of(run: RunPaths, config: TrainConfig) -> dict[str, str]:
    """`reward_weights`, but with the run's own copies of the tastes that it has."""
    kept = {name: str(run.taste(name)) for name in config.reward_weights if _is_kept(run, name)}
    return config.reward_weights | kept


def keep_tastes(run: RunPaths, tastes: dict[str, Taste]) -> None:
    """Write the run's copies of `tastes`, as far as it has none."""
    for name, taste in tastes.items():
        if not run.taste(name).exists():
            write_atomically(run.taste(name), taste.fitted.save)


def changed_tastes(run: RunPaths, config: TrainConfig) -> str:
    """Which tastes have other votes now than when the run started, as a clause; empty if none has."""
    found = []
    for name, path in config.reward_weights.items():
        if _is_kept(run, name) and (votes := _votes_now(Path(path))):
            kept, (count, digest) = read_fitted(run.taste(name)), votes
            if digest != kept.digest:
                found.append(f"{name} had {number_of(kept.votes, 'vote')} when the run started and has {count} now")
    return " and ".join(found)


def told_of_changes(run: RunPaths, config: TrainConfig) -> str:
    """What a user is told when such a run resumes; empty if nothing has changed."""
    changed = changed_tastes(run, config)
    return f"{changed}; the run goes on with those it started with: start a new run to use all" if changed else ""


def _is_kept(run: RunPaths, name: str) -> bool:
    return is_taste(name) and run.taste(name).exists()


def _votes_now(path: Path) -> tuple[int, str] | None:
    """How many votes count in the taste at `path`, and their digest; None if it is gone."""
    if path.is_file():
        fitted = read_fitted(path)
        return fitted.votes, fitted.digest
    taste = TasteFolder(path)
    return (len(votes := taste.counted()), digest_of(votes)) if taste.exists else None
