"""Examples that are a prompt with several completions: what preferences and groups of answers are trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.data.chunk import ROWS, Law
from llmkit.data.encode import Rendered
from llmkit.data.node import Data, Readable
from llmkit.data.preferred import DOUBT, SAME, Offered, offered
from llmkit.data.prepare import named
from llmkit.data.prepared import Prepared
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable, introduced
from llmkit.data.usable import Tally, readable

Array = np.ndarray[Any, Any]
Tokens = tuple[list[int], list[float]]
Written = Callable[[Renderer, Row], Rendered]
MOVED = "prompt cut short: tokens reach over its end"


def _none() -> Array:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Groups(Prepared):
    """Examples of a prompt (P tokens, at least one) with K completions behind it, end to end."""

    forks: Array = field(default_factory=_none)
    """Where in `ids` each completion begins, (C,) over all examples; it ends where the next one or the example does."""
    firsts: Array = field(default_factory=lambda: np.zeros(1, np.int64))
    """The first completion of each example, and the number of all."""
    per: Mapping[str, Array] = field(default_factory=dict)
    """(C,) each: figures of completions."""
    each: Mapping[str, Array] = field(default_factory=dict)
    """As long as `ids` each: figures of tokens."""

    def length(self, index: int) -> int:
        """Tokens of a forward over the example: its prompt once, and its completions."""
        return super().length(index) - 1  # each completion begins with the prompt's last token and lacks its own

    def spread(self, index: int) -> int:
        """Tokens of a forward in which each completion has the prompt before it."""
        spans = self.completions(index)
        prompt = spans[0][0] - int(self.starts[index])
        return sum(prompt - 1 + end - begin for begin, end in spans)

    def completions(self, index: int) -> list[tuple[int, int]]:
        """Where in `ids` the completions of an example lie."""
        begins = self.forks[int(self.firsts[index]) : int(self.firsts[index + 1])].tolist()
        return list(zip(begins, [*begins[1:], int(self.starts[index + 1])], strict=True))

    def sample(self, index: int) -> tuple[Array, ...]:
        """(tokens, labels, weights) of an example, laid out with its prompt once."""
        first, ids, weights = int(self.starts[index]), np.asarray(self.ids), np.asarray(self.weights)
        spans = self.completions(index)
        border = spans[0][0]
        seen = [np.arange(first, border - 1), *(fed(border, *span) for span in spans)]
        said = [np.full(border - 1 - first, -1), *(np.arange(*span) for span in spans)]
        here, there = np.concatenate(seen), np.concatenate(said)
        return ids[here], np.where(there < 0, 0, ids[there]), np.where(there < 0, 0, weights[there])

    def check_offers(self, wanted: int, loss: str, key: str) -> None:
        """Raises: DataError when an example has another number of completions than a loss is of."""
        odd = np.flatnonzero(np.diff(self.firsts) != wanted)
        if len(odd):
            file, line = self.places[int(odd[0])]
            forms = {1: "prompt, completion and label", 2: "prompt, chosen and rejected"}
            what, fix = f"{loss} is of rows with {forms[wanted]}", "give such rows, or use another loss"
            raise DataError(what, fix=fix, file=file, line=line, key=key)

    def check_doubts(self, taken: bool, loss: str, key: str) -> None:
        """Sees to it that a loss reads how likely labels are, where rows say it.

        Raises:
            DataError: it takes every label as certain.
        """
        if not taken and DOUBT in self.per and self.per[DOUBT].any():
            what = f"rows have a probability of their labels, and loss {loss} takes all as certain"
            raise DataError(what, fix="use loss: dpo of variant sigmoid, or leave the column out", key=f"data.{key}")

    def supervised(self, index: int) -> float:
        """Examples count, not their tokens."""
        return 1.0


def fed(border: int, begin: int, end: int) -> Array:
    """Where in `ids` lies what predicts a completion: the last token of its prompt, then all of it but the last."""
    return np.concatenate([[border - 1], np.arange(begin, end - 1)])


def grouped(
    sources: Sequence[Readable],
    data: Data,
    tokenizer: Any,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
    written: Written = Renderer.render,
    counted: str = "rows",
) -> Groups:
    """All examples of `sources`, at least `least` of them; `written` makes of a row the text that a completion is the
    trained part of, `counted` the key of `batch` that says how many a step has.

    Raises:
        DataError: a row cannot be read, too many are unusable, or too few are left.
    """
    renderer, strict = Renderer(tokenizer), data.on_bad_row == "error" or aside is None
    law = Law(data, {}, bool(data.sources("valid")), strict)
    tally = Tally(data, Counter[str](), aside, lint=law.lint(renderer), counted=counted)
    made, begins = list[_Example](), [0]
    for source in sources:
        made += _examples(source, tally, renderer, written)
        begins.append(len(made))
    tally.check(len(made), least, key)
    files = named({path: digest for source in sources for path, digest in source.files().items()})
    return _joined(made, tally, files, tuple(begins))


@dataclass(frozen=True)
class _Example:
    raw: Raw
    row: Row
    prompt: list[int]
    completions: list[Tokens]
    per: Mapping[str, tuple[float, ...]]


def _examples(source: Readable, tally: Tally, renderer: Renderer, written: Written) -> Iterator[_Example]:
    """The usable rows; some hundred are encoded at a time, which the tokenizer does faster."""
    waiting: list[tuple[Raw, Offered, list[Rendered]]] = []
    for raw, values in readable([source], tally):
        try:
            said = offered(values, tally.counts["rows"] - 1)
            rows = [introduced(row, tally.data.system) for row in said.rows]
            texts = [written(renderer, row) for row in rows]
            waiting.append((raw, Offered(tuple(rows), said.per, said.joint), texts))
        except Unusable as reason:
            tally.unusable(raw, str(reason))
        if len(waiting) >= ROWS:
            yield from _encoded(waiting, tally, renderer)
            waiting = []
    yield from _encoded(waiting, tally, renderer)


def _encoded(
    waiting: Sequence[tuple[Raw, Offered, list[Rendered]]], tally: Tally, renderer: Renderer
) -> Iterator[_Example]:
    encoded = iter(renderer.encode([one for *_, rendered in waiting for one in rendered]))
    for raw, said, rendered in waiting:
        texts = [next(encoded) for _ in rendered]
        if tally.lint is not None:
            tally.lint.see(raw, said.rows[0], rendered[0], *texts[0], first=True)
        tally.counts["special text kept plain"] += any(one.mark for one in rendered)
        try:
            prompt, completions = _parted(texts, said.joint, tally)
            completions = _fitted(prompt, completions, tally, raw)
        except Unusable as reason:
            tally.unusable(raw, str(reason))
            continue
        if completions:
            yield _Example(raw, said.rows[0], prompt, completions, said.per)


def _parted(texts: Sequence[Tokens], joint: bool, tally: Tally) -> tuple[list[int], list[Tokens]]:
    """The tokens that all texts begin with, up to where the first of them is trained; and what each goes on with, up to
    the last of its tokens that is trained. A token that reaches over the end of the prompt belongs to completions.

    Raises:
        Unusable: nothing is left of either.
    """
    learned = [np.flatnonzero(weights) for _, weights in texts]
    if not all(map(len, learned)):
        raise Unusable("nothing to learn in a completion")
    ends = [int(places[-1]) + 1 for places in learned]
    border = min(end - 1 if joint else int(places[0]) for places, end in zip(learned, ends, strict=True))
    heads = zip(*(ids[:border] for ids, _ in texts), strict=True)
    size = next((at for at, (one, *others) in enumerate(heads) if any(one != other for other in others)), border)
    if not size:
        raise Unusable("no prompt: the completions begin with different tokens")
    if not joint and size < border:
        tally.counts[MOVED] += 1
    parts = [(ids[size:end], weights[size:end]) for (ids, weights), end in zip(texts, ends, strict=True)]
    _differ(parts)
    return texts[0][0][:size], parts


def _differ(parts: Sequence[Tokens]) -> None:
    if len(parts) > 1 and all(ids == parts[0][0] for ids, _ in parts[1:]):
        raise Unusable(SAME)


def _fitted(prompt: Sequence[int], parts: list[Tokens], tally: Tally, raw: Raw) -> list[Tokens]:
    """The completions as they are, cut, or none, as `overflow` says of a prompt with its longest one."""
    data, longest = tally.data, len(prompt) + max(len(ids) for ids, _ in parts)
    if longest <= data.max_length:
        return parts
    tally.counts[f"overflow: {data.overflow}"] += 1
    if data.overflow == "error":
        what = f"has {longest} tokens, more than data.max_length {data.max_length}"
        fix = "raise data.max_length, or set data.overflow"
        raise DataError(what, fix=fix, file=raw.file, line=raw.line, key="data.overflow")
    room = data.max_length - len(prompt)
    if data.overflow == "drop" or room < 1:
        return []
    cut = [(ids[:room], weights[:room]) for ids, weights in parts]
    _differ(cut)
    if not all(any(weights) for _, weights in cut):
        raise Unusable("nothing to learn in a completion")
    return cut


def _joined(made: Sequence[_Example], tally: Tally, files: dict[str, str], begins: tuple[int, ...]) -> Groups:
    parts = [(one.prompt, *(ids for ids, _ in one.completions)) for one in made]
    edges = np.cumsum([0, *(len(part) for example in parts for part in example)]).astype(np.int64)
    counts_G = [len(one.completions) for one in made]
    heads = np.cumsum([0, *(count + 1 for count in counts_G)])  # of the edges those where examples begin
    ids = np.concatenate([np.array(part, np.int32) for example in parts for part in example])
    weights = np.concatenate([np.array(part, np.float32) for one in made for part in _weights(one)])
    starts, forks = edges[heads], np.delete(edges, heads)
    names = sorted({name for one in made for name in one.per})
    per = {name: np.array([x for one in made for x in _of(one, name)], np.float32) for name in names}
    said = [ids, weights, starts, forks, *per.values()]
    counts = {"examples": len(made), "tokens": len(ids), "supervised tokens": int((weights > 0).sum())}
    return Groups(
        ids=ids,
        weights=weights,
        starts=starts,
        rows=tuple(one.row for one in made),
        counts=dict(tally.counts) | counts,
        digest=hashlib.sha256(b"".join(part.tobytes() for part in said)).hexdigest(),
        files=files,
        places=tuple((one.raw.file, one.raw.line) for one in made),
        lint=tally.lint,
        begins=begins,
        forks=forks,
        firsts=np.cumsum([0, *counts_G]).astype(np.int64),
        per=per,
    )


def _weights(one: _Example) -> list[list[float]]:
    return [[0.0] * len(one.prompt), *(weights for _, weights in one.completions)]


def _of(one: _Example, name: str) -> tuple[float, ...]:
    return one.per.get(name) or (0.0,) * len(one.completions)
