"""Temporal Diffusion Policy Optimization (arXiv 2402.08552): the mathematics and the models.

`trainer/` and `nodes/` are imported as comfy_tdpo.trainer and comfy_tdpo.nodes. In a wheel they are inside this folder;
in a checkout they are beside it.
"""

from pathlib import Path

__version__ = "0.2.0.dev0"

_here = Path(__file__).parent
if not (_here / "trainer").is_dir() and (_here.parent / "trainer").is_dir():
    __path__.append(str(_here.parent))
