"""Critique and revision on a page: how much is objected to in each round, and some answers on their way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from llmkit.core.metrics import Lines
from llmkit.data.order import spread
from llmkit.stages.chart import chart
from llmkit.stages.tables import shortened, table

SHOWN = 12
"""Revisions that are shown, from all over the rows."""
Line = Mapping[str, Any]


def shown_rounds(folder: Path) -> str:
    """What `kind: constitutional` left in this folder; nothing where it left none."""
    rounds = [pair for name in ("", "harmless.") if (pair := _rounds(folder, name))]
    if not rounds:
        return ""
    lines = {name: _shares(own) for name, own in zip(("prompts", "harmless prompts"), rounds, strict=False)}
    drawn = chart("share of answers that are objected to", lines, "round")
    return f"<h2>Objections</h2><div class=grid>{drawn}</div>{_examples(folder, rounds[0])}"


def _rounds(folder: Path, prefix: str) -> list[tuple[list[Line], list[Line]]]:
    """Of each round what was said and what came of it, by their rows."""
    found = list[tuple[list[Line], list[Line]]]()
    for turn in count(1):
        paths = [folder / f"{prefix}{name}-{turn}.jsonl" for name in ("critique", "revision")]
        if not all(path.is_file() for path in paths):
            return found
        said, new = (list[Line](Lines(path).read()[1:]) for path in paths)
        found.append((said, new))
    return found


def _shares(rounds: Sequence[tuple[Sequence[Line], Sequence[Line]]]) -> list[tuple[float, float]]:
    shares = []
    for turn, (said, _) in enumerate(rounds, 1):
        clear = [line["objects"] for line in said if line["objects"] is not None]
        if clear:
            shares.append((float(turn), sum(clear) / len(clear)))
    return shares


def _examples(folder: Path, rounds: Sequence[tuple[Sequence[Line], Sequence[Line]]]) -> str:
    answers = [line["answers"][0] for line in Lines(folder / "sampled.jsonl").read()[1:]]
    rows = list(_revised(answers, rounds))
    if not rows:
        return ""
    some = [rows[at] for at in spread(len(rows), SHOWN)]
    left = f", {len(some)} of {len(rows):,}" if len(some) < len(rows) else ""
    head = ("round", "principle", "answer", "critique", "revision")
    return table(f"Critique and revision{left}", head, some, pre=True)


def _revised(answers: list[str], rounds: Sequence[tuple[Sequence[Line], Sequence[Line]]]) -> Iterator[Sequence[str]]:
    for turn, (said, new) in enumerate(rounds, 1):
        for line, one in zip(said, new, strict=False):
            row = line["row"]
            if one["answer"]:
                yield str(turn), line["principle"], *map(shortened, (answers[row], line["critique"], one["answer"]))
                answers[row] = one["answer"]
