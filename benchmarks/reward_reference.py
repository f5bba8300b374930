"""Scores with upstream's own code on random weights: `python benchmarks/reward_reference.py --work DIR --out DIR`.

Runs in a separate environment with the old packages `hpsv2` and `image-reward`, and imports nothing of comfy_tdpo. To
make this environment:

    python3.11 -m venv old && old/bin/pip install torch==2.4.1 torchvision==0.19.1 transformers==4.33.3 timm==0.6.13 \\
        'numpy<2' 'pandas<2.2' 'pyarrow<16' ftfy fairscale==0.4.13 einops datasets==2.14.7 diffusers==0.21.4 \\
        accelerate==0.23 'huggingface_hub<0.25' clint braceexpand webdataset sentencepiece protobuf
    old/bin/pip install --no-deps hpsv2==1.2.0 image-reward==1.5

For hpsv2 alone, `python3.11 -m venv old && old/bin/pip install '.[hpsv2]'` is enough, with today's torch. hpsv2's wheel
lacks its vocabulary, bpe_simple_vocab_16e6.txt.gz, without which it cannot be imported. So this program copies the
identical file of open_clip into it (--vocabulary; benchmarks/reward_parity.py passes the one of its own open_clip).
image-reward imports OpenAI's clip for rewards that we do not use: an empty clip.py is enough.

For each reward it makes a checkpoint in upstream's file format in --work, lets upstream's code score 16 images with 4
prompts, and writes NAME.json to --out: keys and shapes of the checkpoint, versions, prompts and scores. Weights, images
and prompts come from reward_inputs.py, so that others can make the same. The tests use `--size small`.
"""

import argparse
import json
import platform
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from reward_inputs import BLIPS, CLIPS, OPEN_CLIPS, PROMPTS, REWARDS, bert_vocabulary, images, save, weight  # type: ignore[import-not-found]

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def remembered(encode: Callable) -> Callable:
    """`encode`, asked once for each image or text: upstream asks anew for every pair, and hours are too long."""
    known: dict[bytes, Any] = {}

    def once(*args, **kwargs):
        given = args[0] if args else kwargs["pixel_values"]
        key = given.float().numpy().tobytes()
        if key not in known:
            known[key] = encode(*args, **kwargs)
        return known[key]

    return once


def supply_vocabulary(given: Path | None) -> None:
    """Put `given`, or what open_clip_torch has here, where hpsv2 looks for its vocabulary; what is there is kept."""
    package = package_folder("hpsv2")
    if package is None:
        sys.exit("hpsv2 is not installed in this environment; see --help")
    wanted = package / "src" / "open_clip" / VOCABULARY
    if wanted.exists():
        return
    open_clip = package_folder("open_clip")
    found = given or (open_clip / VOCABULARY if open_clip else None)
    if found is None or not found.exists():
        sys.exit(f"hpsv2 lacks {wanted}; name open_clip's {VOCABULARY} with --vocabulary")
    shutil.copyfile(found, wanted)


def package_folder(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


# --- upstream's lines


def clip_reference(name: str, size: str, work: Path) -> tuple[dict, Callable]:
    """PickScore's and improved-aesthetic-predictor's READMEs and clipscore.py, with transformers' CLIP."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    model = CLIPModel(CLIPConfig(**CLIPS[name, size])).eval()
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    # buffers that transformers kept in its files until version 4.31
    shapes |= {"text_model.embeddings.position_ids": [1, 77], "vision_model.embeddings.position_ids": [1, patches]}
    fill(model, shapes)
    model.get_image_features = remembered(model.get_image_features)
    processor = CLIPProcessor(clip_image_processor(), clip_tokenizer(work))
    head, head_shapes = aesthetic_head(CLIPS[name, size]["projection_dim"])

    def image_embeds(pictures: list[Image.Image]) -> torch.Tensor:
        embeds = model.get_image_features(**processor(images=pictures, return_tensors="pt"))
        return embeds / torch.norm(embeds, dim=-1, keepdim=True)

    def text_embeds(prompt: str) -> torch.Tensor:
        tokens = processor(text=[prompt], padding=True, truncation=True, max_length=77, return_tensors="pt")
        embeds = model.get_text_features(**tokens)
        return embeds / torch.norm(embeds, dim=-1, keepdim=True)

    def score(pictures: list[Image.Image], prompt: str) -> list[float]:
        seen = torch.cat([image_embeds([picture]) for picture in pictures])
        if name == "aesthetic":
            return head(seen)[:, 0].tolist()
        if name == "clipscore":
            return (2.5 * (seen @ text_embeds(f"A photo depicts {prompt}").T).clamp(min=0))[:, 0].tolist()
        return (model.logit_scale.exp() * (text_embeds(prompt) @ seen.T))[0].tolist()

    files = {"model.safetensors": {"shapes": shapes}}
    if name == "aesthetic":
        files = {"sac+logos+ava1-l14-linearMSE.pth": {"shapes": head_shapes}} | files
    return files, score


def aesthetic_head(dim: int) -> tuple[torch.nn.Sequential, dict[str, list[int]]]:
    """Five linear layers, numbered as upstream's, whose dropout counts."""
    widths = (dim, 1024, 128, 64, 16, 1)
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise(widths)))
    shapes = {}
    for number, layer in zip((0, 2, 4, 6, 7), head, strict=True):
        for kind, parameter in layer.named_parameters():
            shapes[f"layers.{number}.{kind}"] = list(parameter.shape)
            parameter.data = weight(f"layers.{number}.{kind}", tuple(parameter.shape))
    return head, shapes


def clip_image_processor():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor()  # its defaults are the configuration published with these models


def clip_tokenizer(work: Path):
    """transformers' tokenizer, its files made of the vocabulary in hpsv2."""
    from hpsv2.src.open_clip.tokenizer import SimpleTokenizer  # type: ignore[import-not-found]
    from transformers import CLIPTokenizerFast

    clip = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    folder = work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {names.get(token, token): number for token, number in clip.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in clip.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizerFast.from_pretrained(folder, model_max_length=77)


def hps_reference(name: str, size: str, work: Path) -> tuple[dict, Callable]:
    """`hpsv2.score`, but for the download of the weights that its checkpoint replaces."""
    from hpsv2 import img_score  # type: ignore[import-not-found]
    from hpsv2.src.open_clip.model import CLIP  # type: ignore[import-not-found]
    from hpsv2.src.open_clip.transform import image_transform  # type: ignore[import-not-found]

    model = CLIP(**OPEN_CLIPS[size], output_dict=True)
    model.encode_image, model.encode_text = remembered(model.encode_image), remembered(model.encode_text)
    img_score.model_dict |= {"model": model, "preprocess_val": image_transform(224, is_train=False)}
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    file = "HPS_v2_compressed.pt"  # that of version 2.1 is made alike

    def score(pictures: list[Image.Image], prompt: str) -> list[float]:
        return [float(value) for value in img_score.score(pictures, prompt, cp=str(work / file))]

    return {file: {"shapes": shapes, "inside": "state_dict"}}, score


def image_reward_reference(name: str, size: str, work: Path) -> tuple[dict, Callable]:
    """`ImageReward.score`, with other sizes where that is asked for."""
    from ImageReward.ImageReward import MLP, ImageReward  # type: ignore[import-not-found]
    from ImageReward.models.BLIP import blip_pretrain  # type: ignore[import-not-found]
    from ImageReward.models.BLIP.vit import VisionTransformer  # type: ignore[import-not-found]
    from transformers import BertTokenizer

    (patch, width, layers, heads), (text_width, text_layers, text_heads, vocabulary) = BLIPS[size]
    config = dict(
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        vocab_size=vocabulary,
        layer_norm_eps=1e-12,
        max_position_embeddings=512,
        encoder_width=width,
        add_cross_attention=True,
    )
    work.mkdir(parents=True, exist_ok=True)
    (work / "med_config.json").write_text(json.dumps(config), encoding="utf-8")
    (work / "vocab.txt").write_text(bert_vocabulary(vocabulary - 2), encoding="utf-8")
    blip_pretrain.create_vit = lambda *_: (VisionTransformer(224, patch, 3, 0, width, layers, heads), width)
    blip_pretrain.init_tokenizer = lambda: BertTokenizer(str(work / "vocab.txt"))
    model = ImageReward(med_config=str(work / "med_config.json"))
    model.mlp = MLP(text_width)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    fill(model, shapes)
    model.eval()
    model.blip.visual_encoder.forward = remembered(model.blip.visual_encoder.forward)

    def score(pictures: list[Image.Image], prompt: str) -> list[float]:
        return [model.score(prompt, picture) for picture in pictures]

    return {"ImageReward.pt": {"shapes": shapes}}, score


def fill(model: torch.nn.Module, shapes: dict[str, list[int]]) -> None:
    """Give `model` the weights of those names; one by one, so that there is one copy of them."""
    for key, value in model.state_dict().items():
        value.copy_(weight(key, tuple(shapes[key])))


REFERENCES = {"imagereward": image_reward_reference, "hpsv2": hps_reference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="*", default=REWARDS, help=f"of {', '.join(REWARDS)}; none: all")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder for what upstream says")
    parser.add_argument("--vocabulary", type=Path, help=f"open_clip's {VOCABULARY}; none: that of open_clip_torch here")
    args = parser.parse_args()
    supply_vocabulary(args.vocabulary)
    for name in args.rewards:
        work = args.work / name
        files, score = REFERENCES.get(name, clip_reference)(name, args.size, work)
        for file, layout in files.items():
            save(work / file, **layout)
        with torch.no_grad():
            scores = [score(images(), prompt) for prompt in PROMPTS]
        record = {
            "command": " ".join(["python", *sys.argv]),
            "python": platform.python_version(),
            "versions": versions(),
            "files": files,
            "prompts": PROMPTS,
            "scores": scores,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(one_line_lists(json.dumps(record, indent=1)) + "\n", encoding="utf-8")
        print(name, "min", np.min(scores), "max", np.max(scores), "std", np.std(scores), flush=True)


def one_line_lists(text: str) -> str:
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), text)


def versions() -> dict[str, str]:
    """Of the packages that decide scores, where they are installed."""
    names = ("torch", "torchvision", "transformers", "timm", "pillow", "hpsv2", "image-reward")
    return {name: found.version for name in names for found in distributions(name=name)}


if __name__ == "__main__":
    main()
