"""The tokenizer of Shapes: CLIP's, with merges learned from the words of the grammar."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizerFast

from .encoders import MAX_TOKENS
from .scenes import COLOURS, COUNTS, PLACES, SHAPES, Item, Request


def build_tokenizer(folder: Path) -> CLIPTokenizerFast:
    """Write a CLIP tokenizer to `folder` and return it.

    Each word of the grammar is one token; other text is split into characters.
    """
    words = _every_word()
    # The trainer breaks ties between merges by the ids of their letters, which it assigns in the order of a hash map.
    # Special tokens get their ids in the order given here, which makes the result reproducible.
    known = sorted(set("".join(words)))
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=known + [f"{letter}</w>" for letter in reversed(known)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator([" ".join(words)], trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokens = sorted(letters) + [f"{letter}</w>" for letter in sorted(letters)]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    shutil.rmtree(folder, ignore_errors=True)  # an old tokenizer.json would be read instead of the files written here
    folder.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _every_word() -> list[str]:
    shapes = [Request((item,)).caption for item in _every_item()]
    places = [f"at the {place}" for place in PLACES]
    return " ".join([*shapes, *places, "a an on background and"]).split()


def _every_item() -> list[Item]:
    return [Item(s, c, n) for s in SHAPES for c in COLOURS for n in (1, *COUNTS)]
