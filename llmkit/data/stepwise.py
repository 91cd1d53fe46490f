"""Rows of solutions in steps, each of which is right or wrong: prompt, completions, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.core.errors import DataError
from llmkit.data.labelled import CHUNK, UNSEEN, Example, Labelled, Labels, joined
from llmkit.data.node import Data, Readable
from llmkit.data.render import Rendered, Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable, is_number
from llmkit.data.usable import Tally, readable

CLASSES = ("wrong", "right")


@dataclass(frozen=True)
class Steps:
    """How a solution is laid out and what its labels mean."""

    separator: str = "\n"
    """Behind each step; the step is judged at its last token."""
    threshold: float = 0.5
    """The least number that is right, where labels are numbers."""


def stepwise(
    sources: Sequence[Readable],
    data: Data,
    tokenizer: Any,
    steps: Steps,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
) -> Labelled:
    """All solutions of `sources`, at least `least` of them: a target at the end of each step that has a label.

    Raises:
        DataError: a row cannot be read, too many are unusable, too few are left, or the separator is no token.
    """
    tally, reader = Tally(data, Counter[str](), aside), StepReader(Renderer(tokenizer), steps)
    made = list(_examples(sources, tally, reader))
    tally.check(len(made), least, key)
    return joined(made, tally, Labels("token", CLASSES), sources)


@dataclass(frozen=True)
class _Asked:
    raw: Raw
    row: Row
    prompt: Rendered
    steps: tuple[str, ...]
    labels: tuple[int, ...]


def _examples(sources: Sequence[Readable], tally: Tally, reader: StepReader) -> Iterator[Example]:
    """The usable rows; encoded some hundred at a time, which the tokenizer does faster."""
    waiting: list[_Asked] = []
    for number, (raw, values) in enumerate(readable(sources, tally)):
        try:
            waiting.append(reader.asked(raw, values, number))
        except Unusable as reason:
            tally.unusable(raw, str(reason))
        if len(waiting) >= CHUNK:
            yield from _encoded(waiting, tally, reader)
            waiting = []
    yield from _encoded(waiting, tally, reader)


def _encoded(waiting: Sequence[_Asked], tally: Tally, reader: StepReader) -> Iterator[Example]:
    laid = reader.laid([(one.prompt, one.steps) for one in waiting])
    for one, (ids, ends) in zip(waiting, laid, strict=True):
        try:
            size, kept = _fitted(len(ids), ends, tally, one.raw)
            targets = [UNSEEN] * size
            for end, label in zip(ends[:kept], one.labels, strict=False):
                targets[end] = label
            if size and max(targets) == UNSEEN:
                raise Unusable("no step with a label is left")
        except Unusable as reason:
            tally.unusable(one.raw, str(reason))
            continue
        if size:
            yield Example(one.raw, one.row, ids[:size], targets, 0)


def _fitted(size: int, ends: Sequence[int], tally: Tally, raw: Raw) -> tuple[int, int]:
    """(tokens, steps) that stay: all, the whole steps that fit, or nothing, as `overflow` says."""
    data = tally.data
    if size <= data.max_length:
        return size, len(ends)
    tally.counts[f"overflow: {data.overflow}"] += 1
    if data.overflow == "error":
        what = f"has {size} tokens, more than data.max_length {data.max_length}"
        fix = "raise data.max_length, or set data.overflow"
        raise DataError(what, fix=fix, file=raw.file, line=raw.line, key="data.overflow")
    kept = sum(end < data.max_length for end in ends)
    if data.overflow == "drop":
        return 0, 0
    if not kept:
        raise Unusable("no step is left")
    return ends[kept - 1] + 1, kept


@dataclass
class StepReader:
    """From a prompt and steps to tokens, and where the steps end.

    Raises:
        DataError: the tokenizer makes nothing of the separator.
    """

    renderer: Renderer
    how: Steps
    between: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.between = self.renderer.tokenizer(self.how.separator, add_special_tokens=False)["input_ids"]
        if not self.between:
            what = f"the tokenizer makes no token of the separator {self.how.separator!r}"
            raise DataError(what, fix='set separator: "\\n"', key="separator")

    def asked(self, raw: Raw, values: Mapping[str, Any], id: int) -> _Asked:
        """What a row says.

        Raises:
            Unusable: with the reason.
        """
        prompt, steps = values.get("prompt"), self.checked(values.get("completions"))
        given = values.get("labels")
        if not isinstance(given, list) or len(given) != len(steps):
            raise Unusable("labels is not a list as long as completions")
        labels = tuple(self.label(one) for one in given)
        cluster = str(values.get("cluster", id))
        row = Row(id, cluster, prompt=prompt) if isinstance(prompt, str) else Row(id, cluster, tuple(prompt or ()))
        return _Asked(raw, row, self.prompt(prompt), steps, labels)

    def prompt(self, asked: Any) -> Rendered:
        """A text, or messages up to where the answer begins.

        Raises:
            Unusable: it is neither.
        """
        if isinstance(asked, str) and asked.strip():
            return self.renderer.prompt(asked)
        if not isinstance(asked, list | tuple) or not asked:
            raise Unusable("no prompt")
        if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in asked):
            raise Unusable("prompt is not a list of messages")
        return self.renderer.prompt(asked)

    def checked(self, steps: Any) -> tuple[str, ...]:
        """The steps.

        Raises:
            Unusable: they are none.
        """
        if not isinstance(steps, list | tuple) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            raise Unusable("completions is not a list of texts")
        if self.renderer.specials.search("".join(steps)):
            raise Unusable("special-token text in completions")
        return tuple(steps)

    def label(self, value: Any) -> int:
        """The class of a step's label, `UNSEEN` for null.

        Raises:
            Unusable: it is no truth value and no number.
        """
        if value is None:
            return UNSEEN
        if isinstance(value, bool) or is_number(value):
            return int(value >= self.how.threshold)
        raise Unusable("a label is neither true nor false nor a number")

    def laid(self, asked: Sequence[tuple[Rendered, Sequence[str]]]) -> list[tuple[list[int], list[int]]]:
        """(tokens, the place of each step's last one) of each prompt with its steps. A step has the tokens that it has
        by itself, so that they are the same whatever comes after it."""
        prompts = [ids for ids, _ in self.renderer.encode([prompt for prompt, _ in asked])]
        texts = [step for _, steps in asked for step in steps]
        tokens = iter(self.renderer.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        made = []
        for ids, (_, steps) in zip(prompts, asked, strict=True):
            row, ends = list(ids), []
            for _ in steps:
                row += [*next(tokens), *self.between]
                ends.append(len(row) - 1)
            made.append((row, ends))
        return made
