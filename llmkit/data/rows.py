"""Rows as they are read, each with the place that it came from, and rows as they can be rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.core.errors import DataError

MOST_TEXT = 2_000_000
"""Characters of one row: a tokenizer's time on a longer one has no bound that helps anybody (here: some seconds)."""
DEEPEST = 64
"""Levels of one row: templates walk their values by recursion."""
MOST_TURNS = 1024
"""Objects in one list of a row: a conversation is rendered once for each of its answers."""
KEPT = 1 << 16
"""Bytes of an unusable row that are kept."""
LARGEST = 3.4e38
"""Figures of rows are held in fp32."""


At = Sequence[int]
"""A place behind a row, in a source's own numbers: small, written as JSON, and of no meaning to anybody else."""


@dataclass(frozen=True)
class Raw:
    """One object as read; `text` holds its bytes where the format has lines."""

    values: Mapping[str, Any]
    file: str
    line: int
    text: bytes = b""
    at: At = ()
    """Where reading goes on behind it: `source.rows(raw.at)` begins with the next row."""
    more: bool = False
    """Whether the next row goes on with the document that this one is a piece of."""
    rest: bool = False
    """Whether it goes on with the document of the row before."""


class BadRow(DataError):
    """A row that cannot be used, with what stands in its place."""

    def __init__(self, what: str, fix: str = "", file: str = "", line: int = 0, text: bytes = b"", at: At = ()) -> None:
        super().__init__(what, fix=fix, file=file, line=line)
        self.text, self.at = text[:KEPT], at


def place_of(row: Raw | BadRow) -> str:
    """Where a row stands, as errors write it: `file:line`."""
    said = row if isinstance(row, Raw) else row.problems[0]
    return f"{said.file}:{said.line}"


@dataclass(frozen=True)
class Row:
    """One row that can be rendered: messages, or a prompt (may be empty) with the text to learn."""

    id: int
    cluster: str
    messages: tuple[Mapping[str, Any], ...] = ()
    learn_from: int = 0
    """Index of the first message that may be trained on."""
    prompt: str = ""
    completion: str = ""
    tools: tuple[Any, ...] = ()
    weights: tuple[float | None, ...] = ()
    """What each message weighs by its own word; empty where none says so."""

    @property
    def question(self) -> tuple[Mapping[str, Any], ...] | str:
        """What a model is asked: all before the last answer."""
        return self.messages[:-1] if self.messages else self.prompt

    @property
    def answer(self) -> str:
        """The last answer."""
        return str(self.messages[-1].get("content") or "") if self.messages else self.completion


MEND = "mend the line"
ASIDE = f"{MEND}, or set data.on_bad_row=quarantine"
"""The fix of a line that cannot be read, where there is a recipe with `data`."""


class Unusable(Exception):
    """Why a row cannot be used, as a short reason; rows are counted by it."""


class NoTools(Unusable):
    """It brings tools, and the chat template shows none."""


def rejected(raw: Raw, why: str, fix: str = "") -> BadRow:
    """The error that an object is."""
    text = raw.text or json.dumps(raw.values, default=str).encode()
    return BadRow(why, fix, raw.file, raw.line, text, raw.at)


def bounded(raw: Raw) -> Raw | BadRow:
    """The row, or the error that it is when it is too much for one."""
    letters, deepest, turns = measured(raw.values)
    if deepest > DEEPEST:
        what = f"nests {deepest} deep, more than {DEEPEST}"
        return BadRow(what, "flatten the row", raw.file, raw.line, raw.text, raw.at)
    if letters > MOST_TEXT:
        return rejected(raw, f"holds {letters} characters, more than {MOST_TEXT}", "split the row")
    if turns > MOST_TURNS:
        return rejected(raw, f"holds {turns} objects in a list, more than {MOST_TURNS}", "split the row")
    return raw


def measured(values: Any) -> tuple[int, int, int]:
    """Characters, levels, and objects in the longest list of them."""
    letters = deepest = turns = 0
    waiting: list[tuple[Any, int]] = [(values, 0)]
    while waiting:  # not by recursion, which the row itself could exhaust
        value, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(value, str):
            letters += len(value)
        elif isinstance(value, Mapping):
            letters += sum(len(key) for key in value if isinstance(key, str))
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            turns = max(turns, len(value)) if value and isinstance(value[0], Mapping) else turns
            waiting += [(item, depth + 1) for item in value]
        else:
            letters += 1
    return letters, deepest, turns


def is_number(value: Any) -> bool:
    """Whether a value is a number, finite and not too large to be held; truth values are none."""
    # integers of JSON have no bound, and those that no float can hold are compared all the same
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def mapped(raw: Raw, columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row under our names for its columns.

    Raises:
        DataError: a mapped column is not there.
    """
    if not columns:
        return raw.values
    missing = [theirs for theirs in columns.values() if theirs not in raw.values]
    if missing:
        known = ", ".join(map(str, list(raw.values)[:12])) or "no column at all"
        raise DataError(
            f"has no column {missing[0]}", fix=f"map to one of {known}", file=raw.file, line=raw.line, key="columns"
        )
    taken = set(columns.values())
    rest = {name: value for name, value in raw.values.items() if name not in taken and name not in columns}
    return rest | {ours: raw.values[theirs] for ours, theirs in columns.items()}


def introduced(row: Row, system: str | None) -> Row:
    """A conversation with a system message in front, where it has none of its own."""
    if system is None or not row.messages or row.messages[0].get("role") == "system":
        return row
    messages = ({"role": "system", "content": system}, *row.messages)
    weights = (None, *row.weights) if row.weights else ()
    return replace(row, messages=messages, learn_from=row.learn_from + bool(row.learn_from), weights=weights)
