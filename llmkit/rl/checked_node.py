"""What every reward has, and what those have that are computed in processes of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from llmkit.core.config import Conflict, Duration, config, setting
from llmkit.models.node import ModelRef
from llmkit.plan.beside import Beside
from llmkit.rl.checked import Unscored, column_of
from llmkit.rl.sample import Sample, Score

if TYPE_CHECKING:
    from llmkit.rl.bench import Bench
    from llmkit.rl.checked import Check, Told

NAME = re.compile(r"[A-Za-z0-9_.-]+")
NAMED = 12
"""Columns of a row that an error names."""


@config
class Weighed:
    """What every reward has."""

    kind: str = ""
    name: str = ""
    """What its figures are called; without it, its kind."""
    weight: float = 1.0
    """What its score is multiplied by in the sum; at 0 it is only told."""

    def models(self) -> Mapping[str, ModelRef]:
        """Models that it reads, by their keys."""
        return {}

    def files(self) -> Mapping[str, str]:
        """Files that it reads, by their keys."""
        return {}

    def problems(self) -> Iterator[Conflict]:
        """A name that would be no figure's."""
        if self.name and not NAME.fullmatch(self.name):
            yield Conflict("name", f"{self.name!r} is no plain name", "use letters, digits, _, - and .")

    def beside(self) -> tuple[Beside, ...]:
        """The models that it holds."""
        return ()

    def ready(self) -> None:
        """Sees to it, before there are answers, that what it reads can say what they are worth.

        Raises:
            LlmkitError: it cannot.
        """

    def lacks(self, rows: Sequence[Mapping[str, Any]]) -> Lack | None:
        """The first of these rows to which no answer could have a score, and why, as far as that shows before there
        are answers."""
        return None


@config
class Checked(Weighed):
    """What is computed in processes of its own, so that no answer can hang a run or end it."""

    timeout: Duration = setting(default=10.0, above=0)
    """For one answer."""
    failed: float | None = None
    """What an answer gets that is the end of its process, takes too long or makes the reward fail; such answers are
    counted. Left out, the run ends with an error that names the row."""

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each, or why it has none.

        Raises:
            RecipeError: it is not what it should be.
            ResourceError: what it needs is not installed.
        """
        from llmkit.rl.workers import Workers

        workers = bench.kept(key_of(self), lambda: Workers(asdict(self), self.timeout, self.sent))
        return workers.each(samples, self.failed is None) if samples else []

    def sent(self, sample: Sample) -> Told:
        """What the process is told of a sample."""
        return {"completion": sample.completion}

    def check(self) -> Check:
        """The reward, ready: called in the process."""
        raise NotImplementedError


@dataclass(frozen=True)
class Lack:
    """Why answers to a row can have no score."""

    row: int
    key: str
    """The reward's, that asks for it."""
    why: str
    fix: str


def column_lacks(rows: Sequence[Mapping[str, Any]], column: str) -> Lack | None:
    """The first row that has neither text nor a number in a column."""
    for at, row in enumerate(rows):
        try:
            column_of({"row": row, "named": list(row)[:NAMED]}, column)
        except Unscored as why:
            return Lack(at, "column", str(why), why.fix)
    return None


def key_of(reward: Checked) -> str:
    """What its processes are known by: those that differ in weights alone share them."""
    return repr(replace(reward, name="", weight=1.0, failed=None))
