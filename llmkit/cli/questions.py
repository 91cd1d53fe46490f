"""What the rows of a file ask, and which of them ask nothing that can be answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from llmkit.core.errors import DataError, Problem
from llmkit.data.jsonl import read_jsonl
from llmkit.data.prompt import prompt_ids
from llmkit.data.render import Renderer
from llmkit.data.rows import ASIDE, MEND, BadRow, Raw
from llmkit.inference.check import check_length
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling

MOST_TOLD = 10
"""Rows that are told in one go; those behind them are not looked at."""

Question = tuple[Raw, Any]
"""A row, and what it asks: messages, or a text."""


def questions(path: Path, chat: bool) -> Iterator[Question]:
    """What each row asks.

    Raises:
        DataError: a line is no row that asks something.
    """
    for one in _read(path, chat):
        if isinstance(one, Problem):
            raise DataError(problems=[one])
        yield one


def checked(path: Path, chat: bool, renderer: Renderer, sampling: Sampling, longest: int | None) -> int:
    """How many rows there are, each of which fits in `longest` tokens with its answer.

    Raises:
        DataError: some cannot be asked; the first `MOST_TOLD` of them are named by their places.
    """
    count = 0

    def problems() -> Iterator[Problem]:
        nonlocal count
        for one in _read(path, chat):
            count += 1
            found = one if isinstance(one, Problem) else _unfit(one, renderer, sampling, longest)
            if found is not None:
                yield found

    if wrong := list(islice(problems(), MOST_TOLD)):
        raise DataError(problems=wrong)
    return count


def placed(cause: DataError, raw: Raw) -> Problem:
    """What is wrong with a row, at its place."""
    problem = cause.problems[0]
    what = f"{problem.key}: {problem.what}" if problem.key else problem.what
    return Problem(what, problem.fix, raw.file, raw.line)


def _unfit(question: Question, renderer: Renderer, sampling: Sampling, longest: int | None) -> Problem | None:
    raw, asked = question
    try:
        ids = tuple(prompt_ids(renderer, asked))
        if longest is not None:
            check_length(Request("", ids, sampling), longest)
    except DataError as cause:
        return placed(cause, raw)
    return None


def _read(path: Path, chat: bool) -> Iterable[Question | Problem]:
    for raw in read_jsonl(path):
        yield _problem(raw) if isinstance(raw, BadRow) else _question(raw, chat)


def _problem(row: BadRow) -> Problem:
    """No recipe is here that could set bad rows aside."""
    problem = row.problems[0]
    return replace(problem, fix=MEND) if problem.fix == ASIDE else problem


def _question(raw: Raw, chat: bool) -> Question | Problem:
    if "completion" in raw.values and "reference" in raw.values:
        what = "has a completion, which becomes the reference beside the answer, and a reference"
        return Problem(what, "drop or rename one of the two", raw.file, raw.line)
    asked = _asked(raw.values, chat)
    return (
        Problem("asks nothing", "give messages, prompt, or text", raw.file, raw.line) if asked is None else (raw, asked)
    )


def _asked(said: Mapping[str, Any], chat: bool) -> Any:
    messages = said.get("messages") or (said.get("prompt") if isinstance(said.get("prompt"), list) else None)
    if (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    ):
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if asked:
            return asked
    if isinstance(said.get("prompt"), str):
        return [{"role": "user", "content": said["prompt"]}] if chat else said["prompt"]
    return said["text"] if isinstance(said.get("text"), str) else None
