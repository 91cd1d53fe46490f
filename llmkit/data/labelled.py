"""Rows with labels: a class for each text, or a tag for each word."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llmkit.core.errors import DataError
from llmkit.data.node import Data, Readable
from llmkit.data.prepare import Prepared, named
from llmkit.data.render import Rendered, Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable
from llmkit.data.usable import Tally, readable

Task = Literal["sequence", "token"]
UNSEEN, CHUNK = -1, 256
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def _none() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Labelled(Prepared):
    """Examples whose targets are classes, `UNSEEN` where a token has none; `weights` says what each counts."""

    targets: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=_none)
    classes: tuple[str, ...] = ()
    """Their names, in the order of the model's outputs."""
    groups: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=_none)
    """The group of each example, where the rows say one."""
    group_names: tuple[str, ...] = ()

    def supervised(self, index: int) -> float:
        """The sum of weights that an example trains with."""
        return float(self.weights[int(self.starts[index]) : int(self.starts[index + 1])].sum())

    def sample(self, index: int) -> tuple[np.ndarray[Any, Any], ...]:
        """(tokens, targets, weights) of an example: a token's target is its own."""
        here = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[here], self.targets[here], self.weights[here]

    @property
    def counts_by_class(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How many targets each class has."""
        return np.bincount(self.class_of, minlength=len(self.classes))

    def by_class(self, values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The value of each token's class."""
        factors: np.ndarray[Any, np.dtype[np.float32]] = np.asarray(values, dtype=np.float32)[self.targets]
        return factors

    @property
    def class_of(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The class of each target: of each example, where they have one each."""
        found: np.ndarray[Any, np.dtype[np.int64]] = self.targets[self.targets != UNSEEN]
        return found


def class_names(sources: Sequence[Readable], data: Data, task: Task, column: str = "") -> tuple[str, ...]:
    """Every label (or value of `column`) of these rows, in order: numbers by size, names by the alphabet.

    Raises:
        DataError: a row cannot be read, or there is none with a label.
    """
    found: set[str] = set()
    tally = Tally(data, Counter[str](), lambda bad: None)
    key = column or {"sequence": "label", "token": "tags"}[task]
    for _, values in readable(sources, tally):
        said = values.get(key)
        for one in said if isinstance(said, list) and not column else [said]:
            if (name := _name(one)) is not None:
                found.add(name)
    if len(found) < (1 if column else 2):
        what = f"the rows have {len(found)} different values of {key}, and classes are told apart"
        raise DataError(what, fix=f"give rows with {key}, or map the column", key="data.train")
    numbers = all(name.isdecimal() for name in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def _name(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) or (isinstance(value, str) and value.strip()) else None


def class_of(value: Any, classes: Sequence[str], column: str = "label") -> int:
    """The index of a label: a name, or an index (maybe as text), where no name is a number that it could be meant for.

    Raises:
        Unusable: it is neither.
    """
    name = _name(value)
    if name is None:
        raise Unusable(f"{column} is null" if value is None else f"{column} is no name and no index")
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes) and not any(map(NUMBER.fullmatch, classes)):
        return int(name)
    raise Unusable(f"{column} {name[:40]!r} is none of {', '.join(classes)[:80]}")


@dataclass(frozen=True)
class Labels:
    """What rows may say."""

    task: Task
    classes: tuple[str, ...]
    groups: tuple[str, ...] = ()
    """Values of the column `group`; empty where nobody asks for it."""


def labelled(
    sources: Sequence[Readable],
    data: Data,
    tokenizer: Any,
    labels: Labels,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
) -> Labelled:
    """All examples of `sources`, at least `least` of them.

    Raises:
        DataError: a row cannot be read, too many are unusable, or too few are left.
    """
    tally = Tally(data, Counter[str](), aside)
    reader = _Reader(Renderer(tokenizer), labels)
    made = list(_examples(sources, data, tally, reader))
    tally.check(len(made), least, key)
    return joined(made, tally, labels, sources)


@dataclass(frozen=True)
class Example:
    """A row with its tokens, a target each, and its group."""

    raw: Raw
    row: Row
    ids: list[int]
    targets: list[int]
    group: int


def _examples(sources: Sequence[Readable], data: Data, tally: Tally, reader: _Reader) -> Iterator[Example]:
    """The usable rows; encoded some hundred at a time, which the tokenizer does faster."""
    waiting: list[_Asked] = []
    for number, (raw, values) in enumerate(readable(sources, tally)):
        try:
            waiting.append(reader.asked(raw, values, number))
        except Unusable as reason:
            tally.unusable(raw, str(reason))
        if len(waiting) >= CHUNK:
            yield from _encoded(waiting, data, tally, reader)
            waiting = []
    yield from _encoded(waiting, data, tally, reader)


def _encoded(waiting: Sequence[_Asked], data: Data, tally: Tally, reader: _Reader) -> Iterator[Example]:
    for one, (ids, places) in zip(waiting, reader.encode(waiting), strict=True):
        try:
            ids, targets = _fitted(ids, reader.targets(one, ids, places), data, tally, one.raw, reader)
        except Unusable as reason:
            tally.unusable(one.raw, str(reason))
            continue
        if ids:
            yield Example(one.raw, one.row, ids, targets, one.group)


def _fitted(
    ids: list[int], targets: list[int], data: Data, tally: Tally, raw: Raw, reader: _Reader
) -> tuple[list[int], list[int]]:
    """The example as it is, cut, or nothing, as `overflow` says."""
    size = data.max_length
    if len(ids) > size:
        tally.counts[f"overflow: {data.overflow}"] += 1
        if data.overflow == "error":
            what = f"has {len(ids)} tokens, more than data.max_length {size}"
            fix = "raise data.max_length, or set data.overflow"
            raise DataError(what, fix=fix, file=raw.file, line=raw.line, key="data.overflow")
        if data.overflow == "drop":
            return [], []
        tail = reader.tail if len(reader.tail) < size else []
        kept, label = ids[: size - len(tail)] + tail, max(targets)
        if reader.labels.task == "sequence":
            return kept, reader.at_end(kept, label)
        targets = targets[: size - len(tail)] + [UNSEEN] * len(tail)
        if max(targets) == UNSEEN:
            raise Unusable("no word is left")
        return kept, targets
    return ids, targets


def joined(made: Sequence[Example], tally: Tally, labels: Labels, sources: Sequence[Readable]) -> Labelled:
    """Examples end to end, with their account."""
    starts = np.concatenate([[0], np.cumsum([len(one.ids) for one in made])]).astype(np.int64)
    ids = np.concatenate([np.array(one.ids, dtype=np.int32) for one in made])
    targets = np.concatenate([np.array(one.targets, dtype=np.int64) for one in made])
    weights, groups = (targets != UNSEEN).astype(np.float32), np.array([one.group for one in made], dtype=np.int64)
    counts = tally.counts
    per_class = np.bincount(targets[targets != UNSEEN], minlength=len(labels.classes)).tolist()
    counts.update({f"label {name}": n for name, n in zip(labels.classes, per_class, strict=True)})
    counts.update({"examples": len(made), "tokens": len(ids), "supervised tokens": int(weights.sum())})
    said = (ids, targets, starts, groups, np.frombuffer(repr(labels).encode(), dtype=np.uint8))
    return Labelled(
        ids=ids,
        weights=weights,
        starts=starts,
        rows=tuple(one.row for one in made),
        counts=dict(counts),
        digest=hashlib.sha256(b"".join(part.tobytes() for part in said)).hexdigest(),
        files=named({path: digest for source in sources for path, digest in source.files().items()}),
        places=tuple((one.raw.file, one.raw.line) for one in made),
        targets=targets,
        classes=labels.classes,
        groups=groups,
        group_names=labels.groups,
    )


@dataclass(frozen=True)
class _Asked:
    """A row before it is encoded: a text with one class, or words with one each."""

    raw: Raw
    row: Row
    text: Rendered
    classes: tuple[int, ...]
    group: int
    words: tuple[str, ...] = ()


class _Reader:
    """From a row's values to tokens with a target each; `UNSEEN` where there is none."""

    def __init__(self, renderer: Renderer, labels: Labels) -> None:
        self.renderer, self.labels, self.tokenizer = renderer, labels, renderer.tokenizer
        own = self.tokenizer("a")["input_ids"]
        end = self.tokenizer.eos_token_id
        self.pad = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.tail = own[-1:] if len(own) > 1 and own[-1] in (end, self.tokenizer.sep_token_id) else []
        """What the tokenizer puts behind every text by itself."""

    def asked(self, raw: Raw, values: Mapping[str, Any], id: int) -> _Asked:
        """What a row says.

        Raises:
            Unusable: with the reason.
        """
        cluster = str(values.get("cluster", id))
        group = class_of(values.get("group"), self.labels.groups, "group") if self.labels.groups else 0
        if self.labels.task == "token":
            words, classes = self._tagged(values)
            text = " ".join(words)
            return _Asked(raw, Row(id, cluster, prompt=text), Rendered(text, ()), classes, group, words)
        asked = next((values[name] for name in ("text", "prompt", "messages") if values.get(name) is not None), None)
        label = class_of(values.get("label"), self.labels.classes)
        if isinstance(asked, str) and asked.strip():
            return _Asked(raw, Row(id, cluster, prompt=asked), self.renderer.prompt(asked), (label,), group)
        if not isinstance(asked, list) or not asked:
            raise Unusable("no text, prompt or messages" if asked is None else "the text is blank or not text")
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in asked):
            raise Unusable("messages is not a list of messages")
        return _Asked(raw, Row(id, cluster, messages=tuple(asked)), self.renderer.whole(asked), (label,), group)

    def encode(self, asked: Sequence[_Asked]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(tokens, the letters that each stands for) of each row; letters are told of words alone."""
        if self.labels.task == "sequence":
            made = self.renderer.encode([one.text for one in asked])
            return [(self._ended(one, ids), []) for one, (ids, _) in zip(asked, made, strict=True)]
        if not asked:
            return []
        out = self.tokenizer([one.text.text for one in asked], return_offsets_mapping=True, verbose=False)
        return list(zip(out["input_ids"], out["offset_mapping"], strict=True))

    def _ended(self, one: _Asked, ids: list[int]) -> list[int]:
        """A text with what the tokenizer puts behind it; a conversation ends as its template says."""
        plain = not one.row.messages and self.tail and ids[-1:] != self.tail
        return ids + self.tail if plain else ids

    def targets(self, one: _Asked, ids: Sequence[int], places: Sequence[tuple[int, int]]) -> list[int]:
        """A target for each token; `UNSEEN` where there is none.

        Raises:
            Unusable: there is no token for it.
        """
        return _first_tokens(one.words, one.classes, places) if one.words else self.at_end(ids, one.classes[0])

    def at_end(self, ids: Sequence[int], label: int) -> list[int]:
        """The label at the last token that does not fill rows up, where transformers reads it.

        Raises:
            Unusable: there is none.
        """
        last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] != self.pad), None)
        if last is None:
            raise Unusable("nothing but padding tokens")
        targets = [UNSEEN] * len(ids)
        targets[last] = label
        return targets

    def _tagged(self, values: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        words, tags = values.get("tokens"), values.get("tags")
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise Unusable("tokens is not a list of words")
        if not isinstance(tags, list) or len(tags) != len(words):
            raise Unusable("tags is not a list as long as tokens")
        if self.renderer.specials.search(" ".join(words)):
            raise Unusable("special-token text in tokens")
        return tuple(words), tuple(class_of(tag, self.labels.classes, "a tag") for tag in tags)


def _first_tokens(words: Sequence[str], classes: Sequence[int], places: Sequence[tuple[int, int]]) -> list[int]:
    """Each word's class at the first token that reaches into it.

    Raises:
        Unusable: two words share that token.
    """
    targets, at, start = [UNSEEN] * len(places), 0, 0
    for word, one in zip(words, classes, strict=True):
        while at < len(places) and places[at][1] <= start:
            at += 1
        if at == len(places) or places[at][0] >= start + len(word):
            raise Unusable(f"the tokenizer drops {word[:20]!r}")
        if targets[at] != UNSEEN:
            raise Unusable("two words in one token")
        targets[at] = one
        start += len(word) + 1
    return targets
