"""ComfyUI's folders for runs, LoRAs and the weights of rewards.

Weights of rewards are in models/tdpo_rewards and in folders that extra_model_paths.yaml adds to it.
"""

import logging
from contextlib import suppress
from pathlib import Path

import folder_paths

from comfy_tdpo.rewards.remote import allow_addresses
from comfy_tdpo.tastes.folder import TasteFolder
from comfy_tdpo.user_files import read_text

from ..runs.registry import Runs
from ..runs.tastes import Tastes, tastes_beside

_log = logging.getLogger(__name__)

APPROXIMATE = "vae_approx"  # of ComfyUI itself, for previews
REWARDS = "tdpo_rewards"
REWARD_SUFFIXES = (".pt", ".pth", ".safetensors")
SERVICES = "services.txt"  # in those folders: the addresses that a graph may choose, one a line


def all_runs() -> Runs:
    """The runs in ComfyUI's output folder; their LoRAs go where its own Load LoRA looks, and whole models where Load
    Diffusion Model does."""
    loras, *_ = folder_paths.get_folder_paths("loras")
    models = folder_paths.get_folder_paths("diffusion_models")[-1]  # the first is the old models/unet
    root = Path(folder_paths.get_output_directory()).resolve() / "tdpo"
    return Runs(root, Path(loras).resolve(), Path(models).resolve())


def all_tastes() -> Tastes:
    """The tastes in ComfyUI's output folder."""
    return tastes_beside(all_runs())


def shown_pictures() -> TasteFolder:
    """The pictures that were shown to be voted on; ComfyUI deletes them when it starts again."""
    return TasteFolder(Path(folder_paths.get_temp_directory()).resolve() / "tdpo_shown")


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def lora_names() -> list[str]:
    """The files in ComfyUI's list of LoRAs."""
    return folder_paths.get_filename_list("loras")


def lora_file(name: str) -> Path:
    """The path of the LoRA with this name in ComfyUI's list; ValueError if there is none."""
    path = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None
    if path is None:
        raise ValueError(f"got lora_name {name!r}; expected one of the files in models/loras, or a run on the wire run")
    return Path(path)


def lora_modified(name: str) -> str:
    """When that LoRA's file was last written; empty if there is none."""
    path = folder_paths.get_full_path("loras", name)
    return str(Path(path).stat().st_mtime_ns) if path else ""


# --- tiny decoders ----------------------------------------------------------------------------------------------------


def tiny_decoder_names() -> list[str]:
    """The decoders among the files in ComfyUI's models/vae_approx, which also has the encoders that belong to them."""
    return [name for name in folder_paths.get_filename_list(APPROXIMATE) if "encoder" not in name]


def tiny_decoder_file(name: str) -> str:
    """The path of the tiny decoder with this name in ComfyUI's list; ValueError if there is none."""
    path = folder_paths.get_full_path(APPROXIMATE, name) if name in tiny_decoder_names() else None
    if path is None:
        raise ValueError(
            f"got decoder {name!r}, which is not in models/{APPROXIMATE}; put it there, or choose 'full', or 'tiny' "
            "for the Shapes Model"
        )
    return path


# --- weights of rewards -----------------------------------------------------------------------------------------------


def register_rewards_folder() -> None:
    """Register the folder with ComfyUI, before it asks for the nodes' schemas."""
    folder = Path(folder_paths.models_dir) / REWARDS
    with suppress(OSError):  # without write permission, the folders in extra_model_paths.yaml still work
        folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(REWARDS, str(folder))


def reward_file_names() -> list[str]:
    """The files with weights of rewards, relative to their folder."""
    return [name for name in folder_paths.get_filename_list(REWARDS) if name.endswith(REWARD_SUFFIXES)]


def reward_file(name: str) -> str:
    """The path of the weights with this name; ValueError if there are none, or they would be outside the folders."""
    path = folder_paths.get_full_path(REWARDS, name) if name in reward_file_names() else None
    if path is None:
        raise ValueError(f"got weights {name!r}, which are not in models/{REWARDS}; put them there, or choose 'auto'")
    return path


def remote_names() -> list[str]:
    """The reward services and judges that the owner of this server has listed; no others are allowed in its graphs."""
    files = [Path(folder) / SERVICES for folder in folder_paths.get_folder_paths(REWARDS)]
    names: dict[str, None] = {}
    for file in filter(Path.is_file, files):
        try:
            lines = map(str.strip, read_text(file).splitlines())
            names |= dict.fromkeys(line for line in lines if line and not line.startswith("#"))
        except ValueError as error:  # the node must load without them
            _log.warning("TDPO: no reward services: %s", error)
    allow_addresses(names)
    return list(names)


def look_in_rewards_folder() -> None:
    """Make rewards look for their weights there from now on."""
    from comfy_tdpo.rewards.weights import add_weights_folder  # slow to import, and not needed while ComfyUI starts

    for folder in folder_paths.get_folder_paths(REWARDS):
        add_weights_folder(Path(folder))
