"""The tables of an evaluation, for a terminal and as Markdown: one for each prompt set."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..metrics import columns_of, padded, readable, shortened
from ..recommend.files import BASE_EPOCH
from .asked import PromptSet
from .files import BASE_RUN
from .numbers import Evaluation, Interval, Setup

LONGEST = 28  # columns of a name
INTERVALS = "± is the 95 % interval of the change, over the images of a run or over the runs of a set-up"


class Row(NamedTuple):
    """A snapshot: mean rewards, and their changes from the base model, which has none."""

    name: str
    epoch: str
    queries: str
    means: list[Interval]
    changes: list[Interval | None]


def rows(evaluation: Evaluation, prompts: PromptSet) -> Iterator[Row]:
    """The base model, and every set-up's snapshots."""
    rewards = evaluation.asked.rewards
    means = [evaluation.mean(None, BASE_EPOCH, prompts, reward) for reward in rewards]
    yield Row(BASE_RUN, "-", "0", means, [None] * len(rewards))
    for setup in evaluation.setups:
        for epoch in setup.epochs:
            means = [evaluation.mean(setup, epoch, prompts, reward) for reward in rewards]
            changes = [evaluation.change(setup, epoch, prompts, reward) for reward in rewards]
            yield Row(_name(setup), str(epoch), f"{setup.queries(epoch):.0f}", means, list(changes))


def _name(setup: Setup) -> str:
    count = len(setup.subjects)
    return setup.label if count == 1 else f"{setup.label} ({count} runs)"


def told(evaluation: Evaluation) -> str:
    """The means, for a terminal."""
    return "\n\n".join(_told(evaluation, prompts) for prompts in evaluation.asked.sets)


def _told(evaluation: Evaluation, prompts: PromptSet) -> str:
    head = ["", "epoch", "queries", *(shortened(reward, LONGEST) for reward in evaluation.asked.rewards)]
    lines = [head]
    for row in rows(evaluation, prompts):
        lines.append([shortened(row.name, LONGEST), row.epoch, row.queries, *(readable(own.mean) for own in row.means)])
    widths = [max(columns_of(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join([_title(evaluation, prompts), *(_aligned(line, widths) for line in lines)])


def _aligned(line: list[str], widths: list[int]) -> str:
    first, *cells = line
    aligned = [" " * (width - columns_of(cell)) + cell for cell, width in zip(cells, widths[1:], strict=True)]
    return "  ".join([padded(first, widths[0]), *aligned])


def _title(evaluation: Evaluation, prompts: PromptSet) -> str:
    return f"{prompts.name}: {evaluation.asked.told(prompts)}"


def markdown(evaluation: Evaluation) -> str:
    """Means and changes, followed by the pictures."""
    parts = ["# Evaluation", f"In brackets: the change from the base model; {INTERVALS}."]
    for prompts in evaluation.asked.sets:
        head = ["runs", "epoch", "reward queries", *evaluation.asked.rewards]
        lines = [_cells(head), _cells(["---"] * len(head))]
        lines += [_cells([row.name, row.epoch, row.queries, *_values(row)]) for row in rows(evaluation, prompts)]
        parts += [f"## {_title(evaluation, prompts)}", "\n".join(lines)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in evaluation.pictures]
    return "\n\n".join(parts) + "\n"


def tables_in(text: str) -> list[dict[str, Any]]:
    """The tables in what `markdown` wrote, each with its title and its rows, the first of which is its head."""
    tables: list[dict[str, Any]] = []
    for part in text.split("\n\n"):
        if part.startswith("## "):
            tables.append({"title": part.removeprefix("## "), "rows": []})
        elif part.startswith("| ") and tables:
            head, _, *lines = part.splitlines()
            tables[-1]["rows"] = [_uncelled(line) for line in (head, *lines)]
    return tables


def _values(row: Row) -> list[str]:
    return [_value(own, change) for own, change in zip(row.means, row.changes, strict=True)]


def _value(own: Interval, change: Interval | None) -> str:
    if change is None:
        return readable(own.mean)
    size, half = readable(change.mean, own.mean, "+"), readable(change.half, own.mean)
    return f"{readable(own.mean)} ({size} ± {half})"


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _uncelled(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
