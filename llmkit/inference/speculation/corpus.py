"""A corpus of tokens in which the longest end of a text is found, and what came after it.

Retrieval instead of a model that drafts (REST, arXiv:2311.08252). The corpus is kept backwards, with the order of all
its places by what stands before them: the end of a text, read backwards, is then looked up as a word in a dictionary,
and those beside it share the longest ends. Both lie in files that are mapped and not read: a look-up takes some tens of
comparisons of bytes, however large they are.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.core.errors import DataError, ModelError

DEEP = 32
"""Tokens by which places are told apart: ends of texts are looked up no further back."""
SEEN = 16
"""Places whose next tokens are counted, of all that share the longest end."""
BACKWARDS, ORDER = "backwards.npy", "order.npy"
CHUNK = 1 << 20
"""Tokens that are looked at together where all are."""
MOST = 1 << 32
"""Tokens of one corpus: their places are numbers of 32 bits."""


@dataclass(frozen=True)
class Next:
    """What may follow a text."""

    length: int
    """Tokens of its longest end that is in the corpus."""
    tokens: list[int]
    shares: list[float]
    """How many of the places that were looked at went on with each token, of those that came so far."""


NOTHING = Next(0, [], [])


def indexed(texts: Iterable[NDArray[Any]], words: int) -> tuple[NDArray[Any], NDArray[np.uint32]]:
    """The tokens of all texts backwards, (N,), a mark that is no token after each text; and their places in the order
    of the `DEEP` tokens before them, (N,).

    Raises:
        DataError: there is no token, too many, or one is none of `words`.
    """
    kind, pieces = np.dtype(">u2") if words < 1 << 16 else np.dtype(">u4"), []
    mark = np.array([np.iinfo(kind).max], kind)
    for number, text in enumerate(texts):
        if len(text) and not 0 <= int(text.min()) <= int(text.max()) < words:
            what = f"text {number} holds token {int(text.max())}, and the vocabulary has {words}"
            raise DataError(what, fix="use the model's own tokenizer", key="data.train")
        pieces += [text.astype(kind), mark] if len(text) else []
    made = np.concatenate([*pieces, np.empty(0, kind)])[::-1].astype(kind)  # which concatenating turns around
    if not len(made) or len(made) >= MOST:
        raise DataError(f"{len(made)} tokens make no corpus", fix="give rows with texts, 4 GiB of tokens at most")
    return made, ordered(made)


def ordered(tokens: NDArray[Any]) -> NDArray[np.uint32]:
    """The places of `tokens` in the order of the `DEEP` tokens from each on, by doubling (Manber and Myers 1993)."""
    count, width = len(tokens), 1
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    while True:
        order = np.argsort(rank, kind="stable")
        if width >= DEEP or int(rank.max()) == count - 1:
            return order.astype(np.uint32)
        after = np.zeros(count, np.int64)
        after[:-width] = rank[width:] + 1  # 0: nothing is there, which comes first
        key = rank * (count + 1) + after
        order = np.argsort(key, kind="stable")
        new = np.concatenate([[0], np.cumsum(key[order][1:] != key[order][:-1])])
        rank[order] = new
        width *= 2


def save(folder: Path, backwards: NDArray[Any], order: NDArray[np.uint32]) -> None:
    """Both in files of a folder."""
    np.save(folder / BACKWARDS, backwards, allow_pickle=False)
    np.save(folder / ORDER, order, allow_pickle=False)


class Corpus:
    """A corpus that texts are looked up in."""

    def __init__(self, backwards: NDArray[Any], order: NDArray[np.uint32]) -> None:
        """As `indexed` gives them, or as they lie in files."""
        self.count, self.places, self.width = len(order), range(len(order)), backwards.dtype.itemsize
        self.mark, self.code = int(np.iinfo(backwards.dtype).max), {2: "H", 4: "I"}[self.width]
        plain: Any = backwards.view(np.uint8)
        places: Any = order
        self.bytes, self.order = memoryview(plain), memoryview(places)

    @staticmethod
    def load(folder: Path, said: Mapping[str, Any]) -> Corpus:
        """From the files of a folder; `said` are the settings of its `draft.json`: how many `words` its vocabulary has,
        and its `tokens`.

        Raises:
            ModelError: they are not such as `save` writes.
        """
        try:
            backwards, order = (np.load(folder / name, "r", allow_pickle=False) for name in (BACKWARDS, ORDER))
        except (OSError, ValueError, EOFError) as cause:
            why = next(iter(str(cause).splitlines()), type(cause).__name__)[:120]
            raise _unsound(folder, f"cannot be read ({why})") from cause
        sound = backwards.dtype in (np.dtype(">u2"), np.dtype(">u4")) and order.dtype == np.uint32
        if not sound or backwards.shape != order.shape or order.ndim != 1 or not len(order):
            raise _unsound(folder, "is none")
        if said.get("tokens") != len(order):
            raise _unsound(folder, f"has {len(order)} tokens, and draft.json says {said.get('tokens')!r:.40}")
        if int(order.max()) >= len(order):
            raise _unsound(folder, "names places that it has not")
        words = said.get("words")
        if not isinstance(words, int) or (most := _largest(backwards)) >= words:
            held = f"holds token {most}" if isinstance(words, int) else "is of no vocabulary"
            raise _unsound(folder, f"{held}, and draft.json says words: {words!r:.40}")
        return Corpus(backwards, order)

    def follows(self, text: Sequence[int], count: int, least: int = 1) -> Next:
        """`count` tokens at most that may follow a text of which `least` tokens or more are found."""
        end = list(text[-DEEP:])[::-1]
        if max(end, default=0) >= self.mark:  # a token of an adapter's own
            end = end[: next(at for at, token in enumerate(end) if token >= self.mark)]
        word = self._swapped(array(self.code, end)).tobytes()
        length = self._longest(word)
        if not length or length < least or not count:
            return NOTHING
        low, high = self._places(word[: length * self.width])
        return self._likeliest(length, low, high, count)

    def _word(self, place: int, size: int) -> bytes:
        at = self.order[place] * self.width
        return bytes(self.bytes[at : at + size])

    def _longest(self, word: bytes) -> int:
        """Tokens of the longest beginning of `word` that is there."""
        size = len(word)
        self.at = bisect_left(self.places, word, key=lambda place: self._word(place, size))
        beside = [place for place in (self.at - 1, self.at) if 0 <= place < self.count]
        return max((_same(word, self._word(place, size)) // self.width for place in beside), default=0)

    def _places(self, word: bytes) -> tuple[int, int]:
        """Those of a word that is there, [low, high), near where the last one was looked for."""
        size = len(word)

        def there(place: int) -> bool:
            return 0 <= place < self.count and self._word(place, size) == word

        def key(place: int) -> bytes:
            return self._word(place, size)

        middle, step = self.at if there(self.at) else self.at - 1, 1
        while there(middle - step):
            step *= 2
        low = bisect_left(self.places, word, max(0, middle - step), middle, key=key)
        step = 1
        while there(middle + step):
            step *= 2
        return low, bisect_right(self.places, word, middle, min(self.count, middle + step), key=key)

    def _likeliest(self, length: int, low: int, high: int, count: int) -> Next:
        """What most of the places went on with, token by token: those that went on otherwise are left out."""
        some = range(low, high) if high - low <= SEEN else [low + (high - low) * at // SEEN for at in range(SEEN)]
        rows = [self._after(self.order[place], count) for place in some]
        made = Next(length, [], [])
        for at in range(count):
            rows = [row for row in rows if len(row) > at]
            if not rows:
                break
            token, often = Counter(row[at] for row in rows).most_common(1)[0] if len(rows) > 1 else (rows[0][at], 1)
            made.tokens.append(token)
            made.shares.append(often / len(rows))
            rows = [row for row in rows if row[at] == token] if often < len(rows) else rows
        return made

    def _after(self, at: int, count: int) -> list[int]:
        """The tokens that come after a place, up to the end of its text."""
        row = self._swapped(array(self.code, bytes(self.bytes[max(0, at - count) * self.width : at * self.width])))
        row.reverse()
        made = row.tolist()
        return made[: made.index(self.mark)] if self.mark in made else made

    @staticmethod
    def _swapped(made: array[int]) -> array[int]:
        """From the order of bytes in the files to this machine's, or back."""
        if sys.byteorder == "little":
            made.byteswap()
        return made


def _unsound(folder: Path, what: str) -> ModelError:
    return ModelError(f"its corpus {what}", fix="run kind: draft again", file=str(folder))


def _largest(backwards: NDArray[Any]) -> int:
    """The largest token, the marks between texts left out; -1 where all are marks."""
    mark, most = np.iinfo(backwards.dtype).max, -1
    for at in range(0, len(backwards), CHUNK):
        part = backwards[at : at + CHUNK]
        most = max(most, int(part.max(initial=0, where=part != mark)) if (part != mark).any() else -1)
    return most


def _same(one: bytes, other: bytes) -> int:
    """Bytes at the beginning of both that are the same."""
    size = min(len(one), len(other))
    differs = int.from_bytes(one[:size], "big") ^ int.from_bytes(other[:size], "big")
    return size - (differs.bit_length() + 7) // 8
