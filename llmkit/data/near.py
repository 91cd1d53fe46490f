"""Sieves: which rows are copies, near copies, or hold what an evaluation asks. Each is asked once a row, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from llmkit.core.errors import DataError
from llmkit.data.rows import Raw, Row, Unusable
from llmkit.data.shapes import shaped
from llmkit.data.sketch import WORD, Hashes, digest, shingles

ASKS = ("prompt", "question", "instruction", "turns", "query", "input")
"""Columns that hold what an evaluation asks, where its rows are of no format of ours."""
SEED = 1
FEWEST = 4
"""Words of a question from which on it is looked for as a whole."""


class Left(NamedTuple):
    """Why a row is left out: the name of the finding, and what it is like."""

    name: str
    detail: str


class Copies:
    """Rows that say what an earlier one says, word for word. 16 bytes of each are kept, and its place."""

    def __init__(self) -> None:
        self.seen: dict[int, str] = {}

    def __call__(self, row: Row, place: str) -> Left | None:
        """Whether an earlier row is the same."""
        key = digest(repr((row.messages, row.prompt, row.completion, row.tools)))
        if key in self.seen:
            return Left("removed copy", f"as {self.seen[key]}")
        self.seen[key] = place
        return None


class NearCopies:
    """Rows whose words come, in runs of `ngram`, nearly all from an earlier row (MinHash, Broder 1997).

    Pairs that the index proposes are kept apart where the estimate over all permutations is below the threshold.
    """

    def __init__(self, threshold: float, ngram: int, permutations: int) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as missing:
            what = f"near copies are found by datasketch ({missing})"
            raise DataError(what, fix="pip install datasketch", key="data.dedup.kind") from missing
        self.threshold, self.ngram = threshold, ngram
        self.copies, self.first = Copies(), MinHash(permutations, seed=SEED, hashfunc=int)
        self.signatures: dict[int, Any] = {}
        self.places: list[str] = []
        # more candidates than needed, since each is measured: a pair at the threshold is rarely missed
        self.index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=(0.1, 0.9))

    def __call__(self, row: Row, place: str) -> Left | None:
        """Whether an earlier row is nearly the same."""
        if (copy := self.copies(row, place)) is not None:
            return copy
        runs = shingles(text_of(row), self.ngram)
        if not len(runs):
            return None  # rows without a word are alike in nothing
        signature = self._signature(runs)
        found = [(signature.jaccard(self.signatures[key]), -key) for key in self.index.query(signature)]
        share, earliest = max(found, default=(0.0, 0))
        if share >= self.threshold:
            return Left("removed near copy", f"{share:.0%} as {self.places[-earliest]}")
        self.signatures[len(self.places)] = signature
        self.index.insert(len(self.places), signature)
        self.places.append(place)
        return None

    def _signature(self, found: Hashes) -> Any:
        made = self.first.copy()
        made.update_batch((found >> np.uint64(32)).tolist())
        return made


class Contaminated:
    """Rows that hold at least `share` of the runs of `ngram` words of what one evaluation row asks (2411.15124, 3.1).

    Shorter questions are looked for whole, where they are a message of the row.
    """

    def __init__(self, against: Iterable[tuple[str, str]], ngram: int, share: float) -> None:
        self.ngram, self.share = ngram, share
        self.places: list[str] = []
        self.whole: dict[int, int] = {}
        held: list[Hashes] = []
        for text, place in against:
            index, words = len(self.places), WORD.findall(text.casefold())
            self.places.append(place)
            if FEWEST <= len(words) < ngram:
                self.whole.setdefault(digest(" ".join(words)), index)
            held.append(shingles(text, ngram) if len(words) >= ngram else np.zeros(0, dtype=np.uint64))
        self.sizes = np.array([max(1, len(part)) for part in held], dtype=np.float64)
        flat = np.concatenate([np.zeros(0, dtype=np.uint64), *held])
        owners = np.repeat(np.arange(len(held)), [len(part) for part in held])
        order = np.argsort(flat, kind="stable")
        self.hashes, self.owners = flat[order], owners[order]

    def __call__(self, row: Row, place: str) -> Left | None:
        """Which evaluation row it holds, if any."""
        own = shingles(text_of(row), self.ngram)
        low, high = (np.searchsorted(self.hashes, own, side=side) for side in ("left", "right"))
        hits = [self.owners[a:b] for a, b in zip(low[high > low], high[high > low], strict=True)]
        if hits:
            shares = np.bincount(np.concatenate(hits), minlength=len(self.sizes)) / self.sizes
            best = int(shares.argmax())
            if shares[best] >= self.share:
                return Left("removed contaminated", f"{shares[best]:.0%} of {self.places[best]}")
        for text in texts_of(row) if self.whole else ():
            found = self.whole.get(digest(" ".join(WORD.findall(text.casefold()))))
            if found is not None:
                return Left("removed contaminated", f"asks {self.places[found]}")
        return None


def texts_of(row: Row) -> list[str]:
    """Everything that a row says."""
    if not row.messages:
        return [row.prompt, row.completion]
    return [str(message[k]) for message in row.messages for k in ("reasoning_content", "content") if message.get(k)]


def text_of(row: Row) -> str:
    """Everything that a row says, as one text."""
    return "\n".join(texts_of(row))


def asked(raw: Raw, values: Mapping[str, Any]) -> str:
    """What a row of an evaluation asks: its questions, or all of its text."""
    try:
        row = shaped(values, 0)
    except Unusable:
        said = [values[name] for name in ASKS if values.get(name)]
        return "\n".join(_strings(said or list(raw.values.values())))
    if row.messages:
        return "\n".join(str(m.get("content") or "") for m in row.messages if m["role"] == "user")
    return row.prompt or row.completion


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _strings(part)]
