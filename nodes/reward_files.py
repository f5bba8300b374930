"""Where ComfyUI keeps the weights of rewards: models/tdpo_rewards, and what extra_model_paths.yaml adds to it."""

from contextlib import suppress
from pathlib import Path

import folder_paths

FOLDER = "tdpo_rewards"
SUFFIXES = (".pt", ".pth", ".safetensors")


def register() -> None:
    """Tell ComfyUI of the folder, before it asks the nodes what they are."""
    folder = Path(folder_paths.models_dir) / FOLDER
    with suppress(OSError):  # where nobody may write, the folders that extra_model_paths.yaml names still serve
        folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(folder))


def names() -> list[str]:
    """The files there, relative to their folder."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIXES)]


def path_of(name: str) -> str:
    """Where the file of that name is; ValueError where none is, or it would lie outside the folders."""
    path = folder_paths.get_full_path(FOLDER, name) if name in names() else None
    if path is None:
        raise ValueError(f"got weights {name!r}, which are not in models/{FOLDER}; put them there, or choose 'auto'")
    return path


def look_there() -> None:
    """Have rewards find their weights there, from now on."""
    from comfy_tdpo.rewards.weights import add_weights_folder

    for folder in folder_paths.get_folder_paths(FOLDER):
        add_weights_folder(Path(folder))
