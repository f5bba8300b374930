"""Prompts from other systems and programs: read as their author meant them, or rejected with advice."""

import codecs
import os
from pathlib import Path

import pytest
from toy import new_run, toy_training

import comfy_tdpo.prompts
from comfy_tdpo.models import describe_unread
from comfy_tdpo.models.shipped import CONFIGS, clip_tokenizer
from comfy_tdpo.prompts import load_prompts, prompt_sets
from comfy_tdpo.prompts.length import describe_cut, too_long
from comfy_tdpo.user_files import read_text, user_path

WORDS = ["a café at night", "ein Bär", "一只狐狸"]
LATIN = WORDS[:2]


def written(folder, data, name="mine.txt"):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def lines(prompts, end="\n"):
    return "".join(prompt + end for prompt in prompts)


READ = {
    "UTF-8": (lines(WORDS).encode(), WORDS),
    "UTF-8 with a mark": (codecs.BOM_UTF8 + lines(WORDS).encode(), WORDS),
    "files put together, each with a mark": (b"".join(codecs.BOM_UTF8 + f"{word}\n".encode() for word in WORDS), WORDS),
    "UTF-16, PowerShell's >": (lines(WORDS, "\r\n").encode("utf-16"), WORDS),
    "UTF-16 of the other order": (codecs.BOM_UTF16_BE + lines(WORDS).encode("utf-16-be"), WORDS),
    "UTF-16 without a mark": (lines(LATIN, "\r\n").encode("utf-16-le"), LATIN),
    "UTF-16 of the other order without a mark": ("a fox".encode("utf-16-be"), ["a fox"]),
    "UTF-32": (lines(WORDS).encode("utf-32"), WORDS),
    "UTF-32 without a mark": (lines(WORDS).encode("utf-32-be"), WORDS),
    "line ends of the first Macs": (lines(WORDS, "\r").encode(), WORDS),
    "line ends of Windows": (lines(WORDS, "\r\n").encode(), WORDS),
    "pages and separators": ("a\fb\u2028c\u2029d\ve", ["a", "b", "c", "d", "e"]),
    "DOS's end of a file": (b"a fox\r\n\x1a", ["a fox"]),
    "spaces and blank lines": ("\n  a fox \u00a0\n\t\n\nb\n\n", ["a fox", "b"]),
    "signs that are not seen": ("a\u00a0fox\u200b\n\u200b\n\u00ada bear", ["a fox", "a bear"]),
    "comments": ("# animals\na fox # 1\n  #b\nc", ["a fox # 1", "c"]),
    "the same twice": ("a\nb\na\n", ["a", "b", "a"]),
    "brackets": (
        "((a fox)), [red], {blue}, (v: 2, 16:9) 3:16 - b__c",
        ["((a fox)), [red], {blue}, (v: 2, 16:9) 3:16 - b__c"],
    ),
    "odd words": (
        "C++; (18+) 1.5\n\U0001f98a\na negative prompt",
        ["C++; (18+) 1.5", "\U0001f98a", "a negative prompt"],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_plain_text_of_any_system_is_read(case, tmp_path):
    data, prompts = READ[case]
    assert load_prompts(written(tmp_path, data)) == prompts


TABLES = {
    "commas": ("x.csv", 'id,Prompt\n1,"a fox, red"\n2,a bear\n', ["a fox, red", "a bear"]),
    "Excel in Europe": ("x.csv", "\ufeffid;caption\r\n1;ein Fuchs, rot\r\n", ["ein Fuchs, rot"]),
    "tabs": ("x.tsv", "Prompt\tCategory\na fox, red\tAnimals\n", ["a fox, red"]),
    "quotes and lines": ("x.csv", 'prompt\n"a sign\nthat says ""hi"""\n', ['a sign that says "hi"']),
    "a hash": ("x.csv", "prompt\n#1 fox\n", ["#1 fox"]),
    "an array": ("x.json", '["a fox", "a\\nbear"]', ["a fox", "a bear"]),
    "objects": ("x.json", '[{"id": 1, "prompt": "a fox", "text": "no"}, {"prompt": "b"}]', ["a fox", "b"]),
    "lines": ("x.jsonl", '{"text": "a\u2028fox"}\n\n"a bear"\n', ["a fox", "a bear"]),
    "lines called JSON": ("X.JSON", '{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_and_json_are_read(case, tmp_path):
    name, text, prompts = TABLES[case]
    assert load_prompts(written(tmp_path, text, name)) == prompts


REFUSED = {
    "Windows-1252": ("x.txt", b"a fox\na caf\xe9 at night\n", "line 2 contains the byte 0xe9; it looks like an older"),
    "Chinese in UTF-16 without a mark": ("x.txt", "一二三".encode("utf-16-le"), "contains null bytes, as UTF-16"),
    "UTF-16 appended to UTF-8": (
        "x.txt",
        b"a fox\n" + "a bear\r\n".encode("utf-16"),
        "files in mixed encodings",
    ),
    "UTF-8 appended to UTF-16": ("x.txt", "a\r\n".encode("utf-16") + b"a fox\n", "is not UTF-16 throughout"),
    "UTF-16 that was cut off": ("x.txt", "a fox".encode("utf-16")[:-1], "is not UTF-16 throughout"),
    "zeros": ("x.txt", b"a\0fox\n", "contains null bytes"),
    "a control character": ("x.txt", "a\n\x1b[31mred", "control character U+001B in line 2"),
    "an image": ("x.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a PNG image; expected plain text"),
    "a document": ("x.txt", rb"{\rtf1\ansi a fox}", "is a formatted document (RTF)"),
    "a page": ("x.txt", "<!DOCTYPE html>\n<html>", "is a web page"),
    "nothing": ("x.txt", b"", "holds no prompt"),
    "comments alone": ("x.txt", "# a fox\n", "lines that begin with # are comments"),
    "JSON": ("x.txt", '["a fox"]', "rename it to .json"),
    "JSON lines": ("x.txt", '{"prompt": "a fox"}\n{"prompt": "b"}', "or to .jsonl if every line is an object"),
    "a table": ("x.txt", "id,prompt\n1,a fox\n", "begins with 'id,prompt', as a table does"),
    "numbers": ("x.txt", "1. a fox\n2. a bear\n", "a number before every line, such as '1. a fox'"),
    "bullets": ("x.txt", "- a fox\n- a bear\n", "a bullet before every line"),
    "quotes": ("x.txt", '"a fox",\n"a bear",\n', "every line in quotes"),
    "kohya's options": (
        "x.txt",
        "b\na fox --n bad --w 512\nc --d 1",
        "in line 2 and 1 more, '--n'; expected plain words",
    ),
    "Midjourney's": ("x.csv", "prompt\na fox --ar 16:9\n", "options of another program in line 2"),
    "alternatives": ("x.jsonl", '{"prompt": "a {red|blue} fox"}', "dynamic prompts in line 1, '{red|blue}'"),
    "wildcards": ("x.json", '["a __colour__ fox"]', "a wildcard in item 1, '__colour__'"),
    "weights": ("x.txt", "a (red:1.2) fox", "a weight of a user interface in line 1, '(red:1.2)'"),
    "a LoRA": ("x.txt", "a fox <lora:more:0.8>", "a tag of a user interface"),
    "editing": ("x.txt", "a [fox:bear:0.5]", "prompt editing"),
    "a style": ("x.csv", "name,prompt\nold,a {prompt} in oil\n", "a placeholder of a style in line 2, '{prompt}'"),
    "escaped brackets": ("x.txt", r"a fox \(film\)", "an escaped bracket of a user interface in line 1"),
    "Compel's weights": ("x.txt", "a (red)1.3 fox", "a weight of Compel in line 1, ')1.3'"),
    "Compel's blends": ("x.txt", '("a fox", "a bear").blend(0.5, 0.5)', "a blend of Compel in line 1"),
    "a chat command": ("x.txt", "/imagine prompt: a fox", "a chat command in line 1, '/imagine prompt:'"),
    "A1111's metadata": ("x.txt", "a fox\nNegative prompt: bad\nSteps: 20, Seed: 1", "a negative prompt in line 2"),
    "settings of an image": ("x.txt", "a fox\nSteps: 20, Seed: 1", "settings of an image's metadata in line 2"),
    "comments of other languages": ("x.txt", "// mine\na fox\n; b", "a comment in line 1 and 1 more, '//'"),
    "a fence": ("x.txt", "```\na fox\n```\n", "has no word in line 1, only '```'"),
    "signs alone": ("x.txt", "a fox\n...\n", "has no word in line 2, only '...'"),
    "a tab": ("x.txt", "a fox\t1.0\n", "control characters or halves of characters in line 1, '\\t'"),
    "YAML": ("x.yaml", "- a fox", "got YAML as prompts"),
    "half a character": ("x.json", r'["a \ud83e fox"]', "halves of characters in item 1"),
    "unknown columns": ("x.csv", "id,words\n1,a fox\n", "begins with 'id,words'; expected the names of its columns"),
    "two columns": ("x.csv", "caption,text\na,b\n", "begins with 'caption,text'"),
    "commas without quotes": ("x.csv", "prompt\na fox, red\n", "has 2 fields in line 2 and 1 in its header"),
    "quotes without an end": ("x.csv", 'prompt\n"a fox\nb\n', "cannot be parsed at line 3"),
    "an empty cell": ("x.csv", "id,prompt\n1,\n", "has no prompt in line 2"),
    "a number": ("x.json", '["a", 5]', "has 5 in item 2; expected a prompt as text"),
    "another key": ("x.jsonl", '{"p": "a fox"}', "has the keys p in line 1"),
    "an object": ("x.json", '{"a": {"p": "a fox"}}', "expected an array"),
    "no JSON": ("x.json", "a fox\n", "is not valid JSON"),
    "an array of several lines": ("x.jsonl", '[\n"a"\n]', "is not valid JSON in line 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_list_of_prompts_is_refused_by_name(case, tmp_path):
    name, data, message = REFUSED[case]
    path = written(tmp_path, data, name)
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    assert message in str(error.value) and path in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value).replace(path, "")) < 300


def test_what_is_no_file_is_refused_by_name(tmp_path):
    link, pipe, big = tmp_path / "link.txt", tmp_path / "pipe.txt", tmp_path / "big.txt"
    with pytest.raises(ValueError, match="is a folder; expected a text file"):
        load_prompts(str(tmp_path))
    with pytest.raises(ValueError, match="expected a text file with one prompt per line, or one of complex"):
        load_prompts(str(tmp_path / "none.txt"))
    big.write_bytes(b"a fox\n")
    os.truncate(big, 100 * 2**20)
    with pytest.raises(ValueError, match="has 100 MiB; expected text of at most 64 MiB"):
        load_prompts(str(big))
    if os.name != "nt":
        link.symlink_to(tmp_path / "gone" / "prompts.txt")
        with pytest.raises(ValueError, match=r"is a link to '.*gone/prompts.txt', which is not there"):
            load_prompts(str(link))
        os.mkfifo(pipe)
        with pytest.raises(ValueError, match="is a pipe or a device"):
            load_prompts(str(pipe))


def test_a_mark_in_the_middle_of_text_is_left_out_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("a\ufeffb\u200b\u2028\t c\r\n\r".encode())
    assert read_text(path) == "ab\u200b\u2028\t c\n\n"


@pytest.mark.parametrize("name", prompt_sets())
def test_the_shipped_sets_are_read_to_the_last_line(name):
    path = Path(comfy_tdpo.prompts.__file__).with_name(f"{name}.txt")
    assert load_prompts(name) == path.read_text(encoding="utf-8").splitlines()


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    written(tmp_path, "a fox")
    assert load_prompts("~/mine.txt") == ["a fox"]
    assert user_path("~/x") == tmp_path / "x"
    with pytest.raises(ValueError, match="~nobody-of-that-name has no home folder here"):
        user_path("~nobody-of-that-name/x")
    with pytest.raises(ValueError, match="got '' as a path"):
        user_path("")


def test_a_path_that_only_this_locale_cannot_write_is_told_from_one_that_is_not_utf8(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("ascii", "surrogateescape"))  # under LC_ALL=C
    with pytest.raises(ValueError, match="the encoding of this system, .*, does not have; set PYTHONUTF8=1"):
        user_path("caf\udcc3\udca9")
    with pytest.raises(ValueError, match="is not UTF-8; rename"):
        user_path("caf\udce9")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_prompts_longer_than_clip_reads_are_found(family):
    tokenizer = clip_tokenizer(CONFIGS / family)
    fits, cut = "fox " * 75, "fox " * 75 + "bear"  # a word each, and the tokens of start and end: 77 in all
    assert too_long(tokenizer, ["", "a fox", fits]) == []
    (found,) = too_long(tokenizer, ["a fox", cut, cut])
    assert (found.prompt, found.tokens, found.limit, found.read) == (cut, 78, 77, fits.strip())
    assert [found.read for found in too_long(tokenizer, ["a red fox"], limit=4)] == ["a red"]
    message = describe_cut(too_long(tokenizer, [cut, cut + " cat"]))
    assert "2 prompts are longer" in message and "has 79 tokens of at most 77" in message
    message = describe_cut(too_long(tokenizer, ["a red fox"], limit=4))
    assert message == (
        "a prompt is longer than the text encoder reads: 'a red fox' has 5 tokens of at most 4 and is read up to "
        "'a red'; shorten it: the model never sees the rest"
    )


LONG = "a red circle " * 5  # of words that are a token each; the tiny encoder reads 16, with those of start and end


def ours(records):
    return [record for record in records if record.name.startswith("comfy_tdpo")]


def test_a_training_warns_once_of_prompts_that_its_model_does_not_read_to_their_end(make_policy, tmp_path, caplog):
    run = new_run(tmp_path / "run", prompts=str(written(tmp_path, f"a blue square\n{LONG}")))
    training = toy_training(run, make_policy)
    (record,) = ours(caplog.records)
    assert record.levelname == "WARNING"
    assert record.message.startswith("a prompt is longer than the text encoder reads: ")
    assert "has 17 tokens of at most 16 and is read up to" in record.message
    training.policy.model.encode = lambda prompts: None  # of no known limit, as for prompts that came encoded
    assert describe_unread(training.policy.model, [LONG]) == ""


def test_prompts_that_are_read_whole_are_no_warning(make_policy, tmp_path, caplog):
    toy_training(new_run(tmp_path / "run"), make_policy)
    assert not ours(caplog.records)
