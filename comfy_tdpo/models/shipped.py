"""What the package supplies of published models: configurations and CLIP's tokenizer, which a single file lacks.

The configurations in configs/ are those published with the models, and CLIP's vocabulary comes from open_clip, so a
file can be loaded offline.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

CONFIGS = Path(__file__).parent / "configs"


def read_config(configs: Path, name: str) -> dict:
    return json.loads((configs / name).read_text(encoding="utf-8"))


def clip_tokenizer(configs: Path, name: str = "tokenizer") -> CLIPTokenizer:
    """CLIP's tokenizer, with the truncation and padding of the tokenizer `name` of the family in `configs`."""
    config = read_config(configs, f"{name}/tokenizer_config.json")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in _vocabulary().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=config["model_max_length"])
    # Set after loading: otherwise "!" would become a special token and swallow every "!" of a prompt.
    tokenizer.pad_token = config["pad_token"]
    return tokenizer


@cache
def _vocabulary() -> dict[str, str]:
    """The two files of a CLIP tokenizer, made from open_clip's vocabulary."""
    from open_clip.tokenizer import SimpleTokenizer  # here: importing open_clip takes seconds

    clip = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    numbers = {names.get(token, token): number for token, number in clip.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in clip.bpe_ranks)]
    return {"vocab.json": json.dumps(numbers), "merges.txt": "\n".join(merges) + "\n"}
