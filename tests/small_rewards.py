"""The learned rewards at toy size: upstream's file formats, weights that derive from their names, upstream's scores.

tests/golden holds what upstream's own code made of the same weights; benchmarks/reward_reference.py says how.
"""

import json
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig

from comfy_tdpo.rewards import aesthetic, clipscore, hpsv2, imagereward, pickscore

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
CPU = torch.device("cpu")
REFERENCE = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "reward_inputs.py")))
LEARNED = (*REFERENCE.REWARDS, "hpsv2.1")
WITH_ENCODER = tuple(name for name in LEARNED if name != "imagereward")


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def use_small_architectures(patch: pytest.MonkeyPatch) -> None:
    for name, module in (("aesthetic", aesthetic), ("pickscore", pickscore), ("clipscore", clipscore)):
        patch.setattr(module, "ARCHITECTURE", CLIPConfig(**REFERENCE.CLIPS[name, "small"]))
    patch.setattr(hpsv2, "ARCHITECTURE", REFERENCE.OPEN_CLIPS["small"])
    (patch_size, width, layers, heads), (text_width, text_layers, text_heads, words) = REFERENCE.BLIPS["small"]
    vision = {"patch_size": patch_size, "hidden_size": width, "intermediate_size": 4 * width}
    vision |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    text = {"vocab_size": words, "hidden_size": text_width, "intermediate_size": 4 * text_width}
    text |= {"encoder_hidden_size": width, "num_hidden_layers": text_layers, "num_attention_heads": text_heads}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}  # within the vocabulary, or transformers warns
    patch.setattr(imagereward, "VISION", imagereward.VISION | vision)
    patch.setattr(imagereward, "TEXT", imagereward.TEXT | text)


def save_small_weights(folder: Path) -> dict[str, str]:
    """Every learned reward's checkpoints, in a folder each; name -> folder."""
    for name in LEARNED:
        for file, layout in golden("hpsv2" if name == "hpsv2.1" else name)["files"].items():
            file = "HPS_v2.1_compressed.pt" if name == "hpsv2.1" else file
            REFERENCE.save(folder / name / file, **layout)
    words = REFERENCE.BLIPS["small"][1][3]
    (folder / "imagereward" / "vocab.txt").write_text(REFERENCE.bert_vocabulary(words - 2), encoding="utf-8")
    return {name: str(folder / name) for name in LEARNED}


@cache
def pictures() -> list[Tensor]:
    """The 16 images upstream scored, each (1, 3, H, W) in [0, 1], of different sizes."""
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in REFERENCE.images()]
