"""What lint says: findings with counts and sample places, and the checks that make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llmkit.data.encode import Rendered
    from llmkit.data.rows import Row

Level = Literal["warn", "info"]
SAMPLES = 5
"""Places that a finding keeps."""


@dataclass(frozen=True, order=True)
class Place:
    """One row that shows it: file and line, and what was found there."""

    file: str
    line: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    level: Level
    count: int
    rows: int
    """How many rows were looked at."""
    what: str
    fix: str = ""
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """What a check knows of the tokenizer and the recipe."""

    bos: int | None
    eos: int | None
    special: frozenset[int]
    max_length: int
    overflow: str


@dataclass(slots=True)
class Seen:
    """One row as it was read, rendered and tokenised; `text` is all that it says."""

    row: Row
    rendered: Rendered
    ids: Sequence[int]
    weights: Sequence[float]
    text: str
    asked: str
    answer: str
    plain: bool
    """Whether all of the text is ASCII."""
    tokens: Tokens


@dataclass(frozen=True)
class Check:
    """A check of one row: `test` gives what it found, or nothing."""

    name: str
    level: Level
    what: str
    fix: str
    test: Callable[[Seen], str]
    habit: float = 1.0
    """Share of rows beyond which it is how the data is, and information alone."""
