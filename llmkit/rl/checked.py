"""What a process that scores makes of a reward."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.core.wording import cut

Told = Mapping[str, Any]
"""What a process is told of a sample."""


class Unscored(Exception):
    """The reward or the row is wrong: whatever had been answered, there would be no score."""

    def __init__(self, why: str, fix: str = "mend the row") -> None:
        super().__init__(why)
        self.fix = fix


@dataclass(frozen=True)
class Check:
    """A reward that is ready."""

    scores: Callable[[list[Told]], list[float]]
    together: bool = False
    """Whether it takes all samples in one call."""
    bounded: bool = True
    """Whether its memory is bounded."""


def each(score: Callable[[Told], float]) -> Check:
    """A check of samples by themselves."""
    return Check(lambda samples: [float(score(one)) for one in samples])


def column_of(told: Told, column: str) -> str:
    """What a column of the sample's row says, as text.

    Raises:
        Unscored: there is no such column, or it holds neither text nor a number.
    """
    value = told["row"].get(column)
    nan = isinstance(value, float) and math.isnan(value)
    if nan or isinstance(value, bool) or not isinstance(value, str | int | float):
        what = "is empty" if column in told["row"] and value is None else "holds no text and no number"
        there = f"column {column} {what}" if column in told["row"] else f"its row has no column {column}"
        other = f", or name another column (columns: {', '.join(told['named'])})" if told["named"] else ""
        raise Unscored(there, f"give rows with it{other}")
    return str(value)


def last_match(pattern: Any, text: str) -> str | None:
    """The first group of a pattern's last match, or all of the match; None where there is none."""
    found = next(iter(deque(pattern.finditer(text), maxlen=1)), None)
    return None if found is None else found[min(1, found.re.groups)] or ""


def short(text: str) -> str:
    """Some letters of a text, for an error."""
    return repr(cut(text, 40))
