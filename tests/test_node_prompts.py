"""Prompts from a widget or a wire: the same text wherever it came from, and ComfyUI's syntax for CLIP alone."""

from importlib import import_module

import comfyui
import pytest
import standin
from backends import ask
from fake_training import begin, runs_in, wanted

from comfy_tdpo.clean_text import clean, one_line
from comfy_tdpo.nodes.comfy.scoring import prompt_of_each
from comfy_tdpo.nodes.runs.prompts import WRITTEN, read_prompts, spread, words_of
from comfy_tdpo.nodes.runs.resume import difference
from comfy_tdpo.nodes.runs.start import prepare
from comfy_tdpo.prompts import load_prompts

# How a prompt looks that reads "a red circle", by what was pasted with it.
PASTED = {
    "a byte order mark": "\ufeffa red circle",
    "a byte order mark inside": "a \ufeffred circle",
    "spaces that do not break": "a\u00a0red\u202fcircle\u00a0",
    "spaces without a width": "a red\u200b cir\u2060cle\u200b",
    "a joiner": "a red\u200d circle\u200c",
    "marks of direction": "\u200ea red circle\u202c",
    "a soft hyphen": "a red cir\u00adcle",
    "a wide space": "a\u3000red circle",
    "line ends of Windows": "\r\na red circle\r\n",
    "other line ends": "\u2028a red circle\u2029\v\f",
    "tabs": "\ta\tred  circle",
    "a comment": "# mine\na red circle\n  # more",
}
SYNTAX = {
    "a (red:1.3) circle": "a red circle",
    "a ((red)) circle": "a red circle",
    "(a (red:1.2) circle:0.8)": "a red circle",
    "(a red circle)": "a red circle",
    "a red(:1.1) circle": "a red:1.1 circle",
    "a circle \\(red\\)": "a circle (red)",
    "(a \\(red\\) circle:1.2)": "a (red) circle",
    "a fox (16:9)": "a fox 16",
    "a fox (at 9:pm)": "a fox at 9:pm",
    "a (red (blue": "a (red (blue",
    "((a red) circle": "((a red) circle",
    "a) red (circle": "a) red (circle",
    "a fox (b": "a fox (b",
    "(a (b)": "a (b",
    "a fox :) (red:1.1)": "a fox :) (red:1.1)",
    "a (red:1e1) (blue:-1) (green:.5)": "a red blue green",
}


@pytest.mark.parametrize("case", PASTED)
def test_a_prompt_is_the_same_whatever_was_pasted_with_it(case, tmp_path):
    """In the words that are encoded, in the run's folder, in the words of Score Images and in a file of prompts."""
    runs, want = runs_in(tmp_path), wanted(text=PASTED[case])
    run = runs.folder("one")
    prepare(runs, run, want.config(), want.prompts())
    assert want.prompts().words == run.prompts(run.config) == ["a red circle"]
    assert set(run.grid_prompts(run.config)) == {"a red circle"}
    assert prompt_of_each(PASTED[case], 2) == ["a red circle"] * 2
    if "\t" not in PASTED[case]:  # a file with tabs may be a table
        (tmp_path / "mine.txt").write_bytes(PASTED[case].encode())
        assert load_prompts(str(tmp_path / "mine.txt")) == ["a red circle"]


@pytest.mark.parametrize(
    "text",
    ["نمی\u200cخواهم", "क्\u200dष", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "☺\ufe0f", "café", "cafe\u0301"],
)
def test_signs_that_belong_to_letters_stay(text):
    assert clean(text) == one_line(f" {text}\n") == text


@pytest.mark.parametrize("line", SYNTAX)
def test_rewards_read_the_words(line):
    assert words_of(line) == SYNTAX[line]


@pytest.mark.skipif(bool(comfyui.MISSING), reason=comfyui.MISSING)
def test_the_words_are_what_comfyui_reads_with_weights():
    assert ask("syntax", *SYNTAX) == SYNTAX


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("embedding:nice, a fox", "a fox"),
        ("a fox, embedding:nice.pt", "a fox"),
        ("a fox (embedding:nice:1.2), red", "a fox , red"),
        ("a fox BREAK a bear", "a fox a bear"),
        ("a fox, BREAK, red", "a fox, red"),
        ("a BREAKFAST", "a BREAKFAST"),
    ],
)
def test_what_names_nothing_to_see_is_no_word(line, words):
    prompts = read_prompts(line, "prompts")
    assert prompts.words == [words] and prompts.for_clip(words) == line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a fox\na {red|blue} fox", "has alternatives of dynamic prompts in line 2, '{red|blue}'; expected words"),
        ("a __colour__ fox", "has a wildcard in line 1, '__colour__'; .*write each choice as a prompt of its own"),
        ("a ({red|blue}:1.2) fox", "has alternatives"),
        ("a fox <lora:more:0.8>", "has a tag of a user interface"),
        ("a [fox:bear:0.5]", "has prompt editing of a user interface"),
        ("a\0 red circle", "has control characters or halves of characters in line 1"),
        ("a \ud83e fox", "has control characters or halves of characters in line 1"),
        ("a fox\n\nembedding:nice", "has no word in line 3"),
        ("# a fox\n#b", "contains only comments; expected a prompt"),
    ],
)
def test_what_nothing_can_be_made_of_is_refused_before_there_is_a_folder(text, said, tmp_path):
    with pytest.raises(ValueError, match=f"the text of prompts {said}") as error:
        wanted(text=text).prompts()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the text of prompt (has|contains)"):
        prompt_of_each(text, 2)


def test_no_prompt_is_the_set():
    for text in ("", " \n", "\ufeff\u200b\n"):
        assert wanted(text=text).prompts().words == load_prompts("shapes")


def test_words_name_one_prompt_of_a_run_and_any_number_of_images():
    text = "a (red:1.3) fox\n# b\na red fox"
    with pytest.raises(ValueError, match="has 'a red fox', which differs from an earlier line only in its weights"):
        wanted(text=text).prompts()
    assert prompt_of_each(text, 2) == ["a red fox"] * 2
    assert wanted(text="a (red:1.3) fox\na (red:1.3) fox").prompts().words == ["a red fox"] * 2


def test_settings_may_be_pasted_too():
    assert wanted(settings="\ufeffmicro_batch\u00a0= 2\u200b\r\npolicy.alpha = 3.0").config().micro_batch == 2


def test_a_run_keeps_its_weights_and_does_not_resume_with_others(tmp_path):
    runs, texts = runs_in(tmp_path), "a (red:1.3) circle\na blue square"
    begin(runs, text=texts).wait(30)
    run = runs.find("one")

    def changed(text: str) -> str:
        want = wanted(text=text)
        return difference(run, want.config(), want.prompts())

    assert run.prompts(run.config) == ["a red circle", "a blue square"]
    assert changed(texts) == changed("a\u00a0(red:1.3) circle\n# mine\na blue square") == ""
    assert changed("a (red:1.2) circle\na blue square") == "the weights in its prompts were different"
    assert changed("a red circle\na blue square") == "the weights in its prompts were different"
    assert changed("a red circle") == "its prompts were different"
    (run.path / WRITTEN).unlink()
    (run.path / "prompts.txt").write_text(texts, encoding="utf-8")
    assert changed(texts) == "its rewards read the weights in its prompts as words, as version 0.1.0 did"
    (run.path / WRITTEN).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        changed(texts)


# --- the node that gives prompts one by one


@pytest.fixture
def node(monkeypatch):
    standin.install(monkeypatch)
    return import_module("comfy_tdpo.nodes.prompts").Prompts


def test_prompts_are_spread_over_the_list():
    assert spread(list("abcdef"), 3) == ["a", "c", "e"]
    assert spread(list("abc"), 9) == spread(list("abc"), 3) == ["a", "b", "c"]


def test_prompts_are_those_of_the_text_with_their_weights_or_else_of_the_set(node):
    (lines,) = node.execute("shapes", "a (red:1.2) fox\n# no\n\nan owl", 16).values
    assert lines == ["a (red:1.2) fox", "an owl"], "CLIP reads the weights"
    (lines,) = node.execute("shapes", " ", 5).values
    assert len(lines) == 5 and set(lines) <= set(load_prompts("shapes"))
    with pytest.raises(ValueError, match="got prompt_set '/etc/passwd'; expected one of complex"):
        node.execute("/etc/passwd", "", 1)
