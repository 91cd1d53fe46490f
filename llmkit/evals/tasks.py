"""The `tasks` of an evaluation: what is asked and how answers are scored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from llmkit.core.config import Conflict, Later, config, setting
from llmkit.data.node import Data, Docstrings, Source

if TYPE_CHECKING:
    from llmkit.core.records import Prediction
    from llmkit.core.types import Report
    from llmkit.evals.run import Subject


Asked = Literal["text", "classes", "scores", "steps"]
"""What a task asks a model for: that of a language model, of a classifier, or of a reward model."""


@config
class Perplexity:
    """How well the model predicts the answers: perplexity and bits per byte of the text that is learned from."""

    _sized: ClassVar[str] = "max_length"
    asks: ClassVar[Asked] = "text"
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

    asks: ClassVar[Asked] = "text"
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

    asks: ClassVar[Asked] = "text"
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

    _sized: ClassVar[str] = "max_length"
    asks: ClassVar[Asked] = "classes"
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


@config
class PairTask:
    """What a reward model says of rows with a `chosen` and a `rejected` answer: how often the chosen one scores higher,
    and how much of that is length; calibration."""

    _sized: ClassVar[str] = "max_length"
    asks: ClassVar[Asked] = "scores"
    kind: Literal["pairs"] = "pairs"
    name: str = "pairs"
    data: tuple[Source, ...]
    max_length: int = setting(default=1024, least=2)
    """Longer answers are cut."""
    rows: int | None = setting(default=None, least=1)
    """At most so many rows, evenly apart."""

    def run(self, subject: Subject) -> tuple[list[Prediction], list[Report]]:
        """A prediction a pair, and the reports."""
        from llmkit.evals.pairs import pairs

        return pairs(self, subject)


@config
class StepTask:
    """What a process reward model says of the steps of rows with `completions` and `labels`: steps and first errors."""

    _sized: ClassVar[str] = "max_length"
    asks: ClassVar[Asked] = "steps"
    kind: Literal["steps"] = "steps"
    name: str = "steps"
    data: tuple[Source, ...]
    separator: str = "\n"
    """What stands behind each step, as in training."""
    threshold: float = 0.5
    """Labels that are numbers: the least that is right."""
    max_length: int = setting(default=1024, least=2)
    """Of longer solutions the steps that fit are judged."""
    rows: int | None = setting(default=None, least=1)
    """At most so many rows, evenly apart."""

    def run(self, subject: Subject) -> tuple[list[Prediction], list[Report]]:
        """A prediction a step, and the reports."""
        from llmkit.evals.steps import steps

        return steps(self, subject)


@config
class PositionPerplexity:
    """Perplexity by position: what a model makes of tokens far into long documents. Each window is one forward."""

    _sized: ClassVar[str] = "length"
    asks: ClassVar[Asked] = "text"
    kind: Literal["position_perplexity"] = "position_perplexity"
    name: str = "position_perplexity"
    data: tuple[Source, ...]
    """Rows of `text`, or of any other format: all of their tokens count."""
    documents: Literal["whole", "joined"] = "whole"
    """`whole` takes what is long enough by itself, `joined` lays the rows end to end."""
    length: int = setting(default=8192, least=2, most=1 << 24)
    """Tokens of a window."""
    buckets: int = setting(default=8, least=1)
    """Stretches of equal width that a window's positions fall into."""
    rows: int | None = setting(default=None, least=1)
    """At most so many windows, evenly apart."""

    def problems(self) -> Iterator[Conflict]:
        """Buckets of unequal width."""
        if self.length % self.buckets:
            what = f"{self.length} positions do not fall into {self.buckets} buckets of equal width"
            yield Conflict("buckets", what, "give a divisor of length", "length")

    def run(self, subject: Subject) -> tuple[list[Prediction], list[Report]]:
        """A prediction for each bucket of each window, and the reports."""
        from llmkit.evals.windows import position_perplexity

        return position_perplexity(self, subject)


@config
class Passkey:
    """Whether a model finds one fact in a long text, by how long the text is and where the fact lies in it.

    `accuracy`: the true key is likelier than every distractor; `margin`: its log-probability a token less their mean,
    in nats; `exact_match`: greedy decoding writes it.
    """

    _sized: ClassVar[str] = "lengths"
    asks: ClassVar[Asked] = "text"
    kind: Literal["passkey"] = "passkey"
    name: str = "passkey"
    needle: Literal["number", "sentence"] = "number"
    """A number of five digits, or what is best to eat in a town."""
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens of the whole prompt with its answer, each within a sentence of it."""
    depths: int = setting(default=5, least=1)
    """Places of the fact, evenly from the beginning of the text to its end; one is the middle."""
    samples: int = setting(default=4, least=1)
    """Texts with a fact of their own, each at every length and depth."""
    distractors: int = setting(default=9, least=1, most=19)
    """Wrong keys to choose from."""

    def problems(self) -> Iterator[Conflict]:
        """No lengths, or one twice."""
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) != len(self.lengths):
            yield Conflict("lengths", "is no list of different positive numbers", "give some, such as [1024, 2048]")

    def run(self, subject: Subject) -> tuple[list[Prediction], list[Report]]:
        """A prediction for each sample of each cell, and the reports."""
        from llmkit.evals.passkey import passkey

        return passkey(self, subject)


Task = Annotated[
    Perplexity | Generation | MultipleChoice | Classification | PairTask | StepTask | PositionPerplexity | Passkey,
    Later(("python",)),
]

NAMED: dict[str, tuple[Perplexity | Generation | Passkey, ...]] = {
    "docstrings": (
        Perplexity(name="docstrings.perplexity", data=(Docstrings(split="valid"),), rows=200),
        Generation(name="docstrings.rouge", data=(Docstrings(split="valid"),), rows=64, max_tokens=32),
    ),
    "passkey": (Passkey(),),
}
"""Tasks that `llmkit evaluate MODEL --tasks NAME` knows."""


def longest(task: Any) -> tuple[str, int] | None:
    """The key that says how long the sequences of a task may be, and how long the longest is; none for those that ask
    rows as they are."""
    key = getattr(task, "_sized", None)
    if key is None:
        return None
    said = getattr(task, key)
    return key, max(said) if isinstance(said, tuple) else said


def data_of(task: Perplexity) -> Data:
    """How a perplexity task reads its rows: cut, never dropped, so that every model is asked the same."""
    return Data(train=task.data, train_on=task.train_on, max_length=task.max_length, overflow="truncate")
