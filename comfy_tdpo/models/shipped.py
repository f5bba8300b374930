"""What a single file lacks and the package ships: the families' configurations and CLIP's tokenizer.

The configurations in configs/ are those published with the models; CLIP's vocabulary lies in open_clip. So a file loads
offline.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

CONFIGS = Path(__file__).parent / "configs"


def read_config(configs: Path, name: str) -> dict:
    return json.loads((configs / name).read_text(encoding="utf-8"))


def clip_tokenizer(configs: Path) -> CLIPTokenizer:
    """CLIP's tokenizer, cut and padded as the family of `configs` does."""
    config = read_config(configs, "tokenizer/tokenizer_config.json")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in _vocabulary().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=config["model_max_length"])
    # after loading: given at loading, "!" would become a special token and swallow every "!" of a prompt
    tokenizer.pad_token = config["pad_token"]
    return tokenizer


@cache
def _vocabulary() -> dict[str, str]:
    """A CLIP tokenizer's two files, out of open_clip's vocabulary."""
    from open_clip.tokenizer import SimpleTokenizer  # here: importing open_clip takes seconds

    clip = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    numbers = {names.get(token, token): number for token, number in clip.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in clip.bpe_ranks)]
    return {"vocab.json": json.dumps(numbers), "merges.txt": "\n".join(merges) + "\n"}
