"""Stable Diffusion from a folder saved by diffusers, on this machine or on the hub."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5EncoderModel,
)

from ..quiet import quiet_hub, quiet_loading
from . import shipped
from .files import EXPECTED, PICKLE_SUFFIXES, naming, read_json, refused, required
from .names import folder_names
from .published import published
from .scheduler import load_scheduler
from .unsupported import LCM, of_class
from .weights import Weights, check_channels, check_weights, fill

# The components of a Stable Diffusion pipeline, except its scheduler, and those that XL has besides.
_CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
}
_CLASSES_OF_XL = {"text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer}

# Settings of U-Nets with further inputs: guidance (distilled LCM), classes, image embeddings, and sizes, which XL has.
_OF_LCM = "time_cond_proj_dim"
_MORE_CONDITIONS = (_OF_LCM, "class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim")

_T5_TOKENS = ("encoder.embed_tokens.weight", "shared.weight")  # the same weight


def is_hub_id(source: str) -> bool:
    """Whether `source` is written like a hub id "owner/name"."""
    is_file = Path(source).suffix in (".safetensors", *PICKLE_SUFFIXES)
    return not is_file and bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source))


def download(repo: str, dtype: torch.dtype, choose: Callable[[Path], Any]) -> Path:
    """Download `repo` from the hub, or find it in the cache; only the files that are loaded here.

    choose: gives the class of the pipeline whose index, model_index.json, it is given.
    """
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    variant = None if dtype == torch.float32 else "fp16"
    with _hub(repo):
        pipeline = choose(Path(hf_hub_download(repo, "model_index.json")))
        return Path(pipeline.download(repo, variant=variant, use_safetensors=True, **unused))


def local_folder(source: str) -> Path:
    """The folder `source`, or one with the configurations of the hub id `source`, without weights."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    with _hub(source):
        return Path(snapshot_download(source, allow_patterns=["model_index.json", "*/*config.json"]))


def configurations(source: str, check: Callable[[Path], Any]) -> tuple[Path, Path]:
    """The folder with the configurations of the networks of `source`, a folder or a hub id, and the one with that of
    its noise schedule. Those of a preset's model come with the package.

    check: raises ValueError if a folder that does not come with the package is of another model.
    """
    if known := published(source):
        return shipped.CONFIGS / known.networks, shipped.CONFIGS / known.schedule
    folder = local_folder(source)
    check(folder)
    return folder, folder


def index_on_hub(source: str) -> str:
    """The folder in the hub's cache with the index of the hub id `source`.

    Raises:
        ValueError: it cannot be downloaded.
    """
    with _hub(source):
        return str(Path(hf_hub_download(source, "model_index.json")).parent)


@contextmanager
def _hub(repo: str) -> Iterator[None]:
    """Turn what may fail inside the block, where files of `repo` are downloaded, into a ValueError."""
    if not is_hub_id(repo):
        raise ValueError(f"no file or folder {repo!r}; {EXPECTED}; check the path")
    try:
        with quiet_hub():
            yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{repo!r} is not a file or folder here, and cannot be downloaded from the hub: {reason}; {EXPECTED}; "
            "check the name, the connection and HF_HUB_OFFLINE, or log in with `hf auth login` if access is gated"
        ) from error


def pipeline_class(index: Path) -> Any:
    return StableDiffusionXLPipeline if "text_encoder_2" in _classes(index) else StableDiffusionPipeline


def checked_classes(folder: Path) -> dict[str, Any]:
    """The classes of the components in `folder`; raises ValueError if they are not those of Stable Diffusion."""
    classes = _classes(required(folder, "model_index.json"))
    _check_unet(read_json(required(folder, "unet/config.json")), folder, is_xl="text_encoder_2" in classes)
    return classes


def load_folder(folder: Path, dtype: torch.dtype, prediction_type: str | None) -> dict:
    classes = checked_classes(folder)
    scheduler = required(folder, "scheduler/scheduler_config.json")
    return load_parts(folder, classes, dtype) | {"scheduler": load_scheduler(scheduler, prediction_type)}


def load_parts(
    folder: Path, classes: dict[str, Any], dtype: torch.dtype, others: dict[str, nn.Module] | None = None
) -> dict[str, Any]:
    """The networks and tokenizers in `folder`, by name, given their `classes`.

    others: networks that are not read here, by name; a tokenizer must fit its text encoder among them too.
    """
    names = [name for name in classes if name.startswith("tokenizer")]
    networks = {name: empty_network(folder / name, cls) for name, cls in classes.items() if name not in names}
    known = networks | (others or {})
    encoders = {name: known.get(name.replace("tokenizer", "text_encoder")) for name in names}
    tokenizers = {name: load_tokenizer(folder / name, classes[name], encoders[name]) for name in names}
    return {name: load_weights(network, folder / name, dtype) for name, network in networks.items()} | tokenizers


def _classes(index: Path) -> dict[str, Any]:
    """The classes of the pipeline's components, checked before anything large is loaded."""
    classes = _CLASSES | (_CLASSES_OF_XL if "text_encoder_2" in read_json(index) else {})
    check_index(index, classes)
    return classes


def check_index(index: Path, classes: dict[str, Any]) -> None:
    """Raise ValueError if the components of a pipeline are of other classes."""
    parts = read_json(index)
    for name, expected in classes.items():
        part = parts.get(name)
        found = part[-1] if isinstance(part, list) and part else part  # [library, class]
        if str(found).removesuffix("Fast") != expected.__name__.removesuffix("Fast"):
            kind = parts.get("_class_name")
            if other := of_class(str(kind)):
                raise refused(index.parent, other, str(kind))
            raise ValueError(f"{index.parent} is a {kind} whose {name} is {found}, not {expected.__name__}; {EXPECTED}")


def latent_factor(folder: Path) -> int:
    """Pixels for each element of a latent of the autoencoder in `folder`."""
    config = required(folder, "vae/config.json")
    with naming(config):
        return 2 ** (len(read_json(config)["block_out_channels"]) - 1)


def _check_unet(config: dict, folder: Path, is_xl: bool) -> None:
    check_channels(config.get("in_channels", 4), folder)
    sizes = {"addition_embed_type": "text_time"} if is_xl else {}
    for name, value in sizes.items():
        if config.get(name) != value:
            raise ValueError(
                f"the U-Net in {folder} has {name} {config.get(name)!r}, and the folder two text encoders; expected "
                f"{value!r}, as XL has; {EXPECTED}; download or save the whole folder again"
            )
    if more := [name for name in _MORE_CONDITIONS if config.get(name) and name not in sizes]:
        if more[0] == _OF_LCM:
            raise refused(folder, LCM, f"{_OF_LCM} {config[_OF_LCM]!r}")
        raise ValueError(
            f"the U-Net in {folder} is conditioned on more than text and timestep ({more[0]} {config[more[0]]!r}); "
            f"{EXPECTED}; choose the base model of the same family"
        )


def empty_network(folder: Path, cls: Any) -> nn.Module:
    """The network configured in `folder`, without memory for its weights."""
    config = read_json(required(folder.parent, f"{folder.name}/config.json"))
    with quiet_loading(), naming(folder), init_empty_weights():
        is_text = issubclass(cls, PreTrainedModel)
        network = cls(cls.config_class.from_dict(config)) if is_text else cls.from_config(config)
    factor = getattr(network.config, "scaling_factor", 1)
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(
            f"{folder / 'config.json'} has scaling_factor {factor!r}; expected a number above 0, such as 0.18215"
        )
    return network


def load_weights(network: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The empty `network` with the weights in `folder`, in `dtype`."""
    name = "model" if isinstance(network, PreTrainedModel) else "diffusion_pytorch_model"
    weights = Weights(_weight_files(folder, name))
    weights.rename(folder_names(weights.names, network))
    weights.check_numbers(read_json(folder / "config.json").get("quantization_config"))
    return checked_and_filled(network, weights.read("", dtype), dtype, weights.source)


def checked_and_filled(network: nn.Module, found: dict[str, Tensor], dtype: torch.dtype, source: Path) -> nn.Module:
    """The empty `network` with the weights `found` in `source`, in `dtype`; raises ValueError if they do not fit."""
    if isinstance(network, T5EncoderModel):  # stored once, under either name
        for name, other in (_T5_TOKENS, _T5_TOKENS[::-1]):
            if other in found:
                found.setdefault(name, found[other])
    check_weights(source, network, found)
    return fill(network, found, dtype, source)


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The weight files called `name` in `folder`: the plain ones if they exist, otherwise those in fp16."""
    for variant in ("", ".fp16"):
        path, index = folder / f"{name}{variant}.safetensors", folder / f"{name}.safetensors.index{variant}.json"
        if path.is_file():
            return [path]
        if index.is_file():
            return [required(folder, shard) for shard in _shards(index)]
    if shards := sorted(path.name for path in folder.glob(f"{name}*-of-*.safetensors")):
        raise ValueError(
            f"{folder} has shards of weights ({shards[0]}) without {name}.safetensors.index.json, which lists them; "
            "download or save the whole folder again"
        )
    found = ", ".join(path.name for path in sorted(folder.glob("*"))) or "nothing"
    raise ValueError(
        f"{folder} has no weights as .safetensors or .fp16.safetensors (got {found}); "
        "convert them with `pipeline.save_pretrained(folder, safe_serialization=True)`"
    )


def _shards(index: Path) -> list[str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise ValueError(f"{index} has no weight_map from weights to files; download or save the whole folder again")
    return sorted(set(table.values()))


def load_tokenizer(folder: Path, cls: Any, encoder: nn.Module | None) -> Any:
    """The tokenizer in `folder`, of the class `cls`; raises ValueError if it has tokens that the `encoder` lacks."""
    if not (folder / "tokenizer.json").is_file():
        for file in ("vocab.json", "merges.txt") if cls is CLIPTokenizer else ("tokenizer.json",):
            required(folder.parent, f"{folder.name}/{file}")
    with naming(folder):
        tokenizer = cls.from_pretrained(folder, local_files_only=True)
    known = encoder.config.vocab_size if encoder else math.inf
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"{folder.parent} has a {folder.name} of {tokenizer.vocab_size} tokens and a text encoder of {known}; "
            "expected both of the same model; download or save the whole folder again"
        )
    return tokenizer
