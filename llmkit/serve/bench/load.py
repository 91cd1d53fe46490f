"""What a server is asked, and when."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.core.errors import DataError

COMMON = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they"
    " which one you were all her she there would their we him been has when who will no more if out so up said"
    " what its about into than them can only other time new some could these two may first then do any like my now"
    " over such our man me even most made after also did many off before must well back through years much where"
    " your way down should because long"
)
WORDS = COMMON.split()


@dataclass(frozen=True)
class Load:
    """How much is asked of a server."""

    requests: int
    """That are measured."""
    warmup: int = 0
    """Requests before them, under the same load, that are left out."""
    rate: float = math.inf
    """Requests a second, which come by chance and do not wait for each other (a Poisson process); all at once where it
    is infinite."""
    concurrency: int = 0
    """Where it is not 0: so many at a time instead, each as soon as another has ended."""
    seed: int = 0
    timeout: float = 600.0
    """Seconds after which an answer is given up."""

    @property
    def all(self) -> int:
        """Requests, with those that are left out."""
        return self.warmup + self.requests

    def arrivals(self) -> list[float]:
        """When each begins, in seconds."""
        rng, at, times = random.Random(self.seed), 0.0, []
        for _ in range(self.all):
            at += rng.expovariate(self.rate) if math.isfinite(self.rate) else 0.0
            times.append(at)
        return times


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    body: Mapping[str, Any]
    category: str = ""
    """The kind of work that its figures belong to."""
    turns: tuple[str, ...] = ()
    """What is asked after it in the same conversation, each once what came before is answered."""

    def after(self, answer: str) -> Asked | None:
        """The next turn, with the answer to this one before it."""
        if not self.turns:
            return None
        said = [{"role": "assistant", "content": answer}, {"role": "user", "content": self.turns[0]}]
        body = {**self.body, "messages": [*self.body["messages"], *said]}
        return Asked(self.path, body, self.category, self.turns[1:])


@dataclass(frozen=True)
class Made:
    """Prompts of chance words, none like another but for what they share."""

    model: str
    words: int
    """Of a prompt."""
    output: int
    """Tokens of an answer."""
    shared: int = 0
    """Words at the beginning of all of them."""
    exact: bool = True
    """Whether answers go on past the model's own end (`ignore_eos`, which OpenAI's own interface lacks)."""
    chat: bool = False
    seed: int = 0

    def asked(self) -> Iterator[Asked]:
        """One after another, without end."""
        rng = random.Random(self.seed)
        before = rng.choices(WORDS, k=self.shared)
        while True:
            text = " ".join([*before, *rng.choices(WORDS, k=max(1, self.words - self.shared))])
            yield request(self.model, {"prompt": text}, self.output, self.exact, self.chat)


def from_file(path: Path, model: str, output: int, exact: bool) -> list[Asked]:
    """The rows of a jsonl file: `prompt`, `messages` or, as Spec-Bench has them, `turns`, each asked once
    the one before is answered; and `max_tokens` and `category` where a row has its own. A server that takes more fields
    than OpenAI's (`exact`) is told the category.

    Raises:
        DataError: a row is none of these.
    """
    rows = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"cannot be read: {cause}", fix="give a jsonl file", file=str(path)) from cause
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            fix = "write an object with prompt, messages or turns"
            raise DataError("is no request", fix=fix, file=str(path), line=number)
        rows.append(request(model, row, row.get("max_tokens", output), exact, "messages" in row or "prompt" not in row))
    if not rows:
        raise DataError("holds no rows", fix="write an object with prompt or messages a line", file=str(path))
    return rows


def request(model: str, row: Mapping[str, Any], output: int, exact: bool, chat: bool) -> Asked:
    """A streamed request with its usage at the end."""
    body: dict[str, Any] = {"model": model, "max_tokens": output, "temperature": 0.0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    category = row.get("category", "")
    if exact:
        body |= {"ignore_eos": True} | ({"metadata": {"category": category}} if category else {})
    if not chat:
        return Asked("/completions", body | {"prompt": row["prompt"]}, category)
    text = row["turns"][0] if "turns" in row else row.get("prompt")
    said = row.get("messages", [{"role": "user", "content": text}])
    return Asked("/chat/completions", body | {"messages": said}, category, tuple(row.get("turns", ())[1:]))


def _row(line: str) -> Mapping[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("max_tokens", 1), int):
        return None
    if not isinstance(row.get("category", ""), str):
        return None
    turns = row.get("turns")
    spoken = isinstance(turns, list) and bool(turns) and all(isinstance(turn, str) for turn in turns)
    return row if isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list) or spoken else None


def repeated(rows: Sequence[Asked]) -> Iterator[Asked]:
    """The rows over and over."""
    while True:
        yield from rows
