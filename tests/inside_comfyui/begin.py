"""Makes ComfyUI importable, as its own start does; this has to be imported before anything of ComfyUI."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
_, CHECKOUT = sys.argv
sys.path[:0] = [CHECKOUT, str(ROOT)]
sys.argv[1:] = ["--cpu", "--base-directory", str(Path.cwd())]  # where it makes folders

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

if (Path(CHECKOUT) / "comfy_compatibility").is_dir():  # the fork's own: only so does it have `nodes` and `folder_paths`
    from comfy_compatibility.vanilla import prepare_vanilla_environment

    prepare_vanilla_environment()
else:
    import utils.install_util  # noqa: F401 - as main.py does, before `nodes` puts a folder with another `utils` first

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

PROMPTS = ["a red circle", "two blue squares on a green background"]
CPU = torch.device("cpu")


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def patched_in(model: Any) -> Iterator[Any]:
    """Inside the block, what a MODEL wraps has its patches in its weights."""
    model.patch_model(device_to=CPU)
    try:
        yield model.model
    finally:
        model.unpatch_model(device_to=CPU)


def refusal(ask: Callable[[], object]) -> str:
    try:
        ask()
    except ValueError as error:
        return str(error)
    return "was not refused"
