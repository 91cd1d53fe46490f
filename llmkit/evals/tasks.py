"""The `tasks` of an evaluation: what is asked and how answers are scored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from llmkit.core.config import Conflict, Later, config, setting
from llmkit.data.node import Data, Docstrings, Source

if TYPE_CHECKING:
    from llmkit.core.records import Prediction
    from llmkit.core.types import Report
    from llmkit.evals.run import Subject


@config
class Perplexity:
    """How well the model predicts the answers: perplexity and bits per byte of the text that is learned from."""

    kind: Literal["perplexity"] = "perplexity"
    name: str = "perplexity"
    data: tuple[Source, ...]
    train_on: Literal["assistant", "last", "all"] = "assistant"
    max_length: int = setting(default=1024, least=2)
    """Longer rows are cut."""
    rows: int | None = setting(default=None, least=1)
    """At most so many rows, evenly apart."""

    def run(self, subject: Subject) -> tuple[list[Prediction], list[Report]]:
        """A prediction a row, and the reports."""
        from llmkit.evals.run import perplexity

        return perplexity(self, subject)


@config
class Generation:
    """What the model writes, against a reference: exact match and ROUGE (arXiv:1803.01937, by rouge-score)."""

    kind: Literal["generation"] = "generation"
    name: str = "generation"
    data: tuple[Source, ...]
    max_tokens: int = setting(default=128, least=1)
    rows: int | None = setting(default=None, least=1)
    """At most so many rows, evenly apart."""
    extract: str | None = None
    """A regular expression; its last match in answer and reference is what exact match compares."""

    def problems(self) -> Iterator[Conflict]:
        """A pattern that is none."""
        import re

        if self.extract is not None:
            try:
                re.compile(self.extract)
            except re.error as cause:
                yield Conflict("extract", f"{self.extract!r} is no regular expression ({cause})", "mend it")

    def run(self, subject: Subject) -> tuple[list[Prediction], list[Report]]:
        """A prediction a row, and the reports."""
        from llmkit.evals.run import generation

        return generation(self, subject)


@config
class MultipleChoice:
    """Which of several answers is the likeliest. Rows hold `prompt`, `choices` and `label` (an index)."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    name: str = "multiple_choice"
    data: tuple[Source, ...]
    length: Literal["sum", "token", "byte"] = "byte"
    """What a choice's log-probability is divided by: nothing, its tokens, or its bytes."""
    rows: int | None = setting(default=None, least=1)
    """At most so many rows, evenly apart."""

    def run(self, subject: Subject) -> tuple[list[Prediction], list[Report]]:
        """A prediction a row, and the reports."""
        from llmkit.evals.choice import multiple_choice

        return multiple_choice(self, subject)


@config
class Classification:
    """What a classifier says of rows with a `label`, or `tokens` with `tags`: accuracy, macro-F1, recall of each class,
    calibration error."""

    kind: Literal["classification"] = "classification"
    name: str = "classification"
    data: tuple[Source, ...]
    max_length: int = setting(default=1024, least=2)
    """Longer rows are cut."""
    rows: int | None = setting(default=None, least=1)
    """At most so many rows, evenly apart."""

    def run(self, subject: Subject) -> tuple[list[Prediction], list[Report]]:
        """A prediction a row (or word), and the reports."""
        from llmkit.evals.classify import classification

        return classification(self, subject)


Task = Annotated[Perplexity | Generation | MultipleChoice | Classification, Later(("python",))]

NAMED: dict[str, tuple[Perplexity | Generation, ...]] = {
    "docstrings": (
        Perplexity(name="docstrings.perplexity", data=(Docstrings(split="valid"),), rows=200),
        Generation(name="docstrings.rouge", data=(Docstrings(split="valid"),), rows=64, max_tokens=32),
    ),
}
"""Tasks that `llmkit evaluate MODEL --tasks NAME` knows."""


def data_of(task: Perplexity) -> Data:
    """How a perplexity task reads its rows: cut, never dropped, so that every model is asked the same."""
    return Data(train=task.data, train_on=task.train_on, max_length=task.max_length, overflow="truncate")
