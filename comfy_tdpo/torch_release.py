"""Settings that need a newer torch than the package itself."""

import torch

OLDEST = (2, 11)  # with which torch.compile and fully sharded data parallelism were tried


def check_release(setting: str) -> None:
    """Raise ValueError if torch is older than the oldest release with which `setting` was tried."""
    if torch.__version__ < OLDEST:
        raise ValueError(
            f"got {setting} true with torch {torch.__version__}; expected {'.'.join(map(str, OLDEST))} or newer: "
            f"update torch, or set {setting} to false"
        )
