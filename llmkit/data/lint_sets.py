"""The checks over all rows: copies, contradictions, overlap with validation, and what departs from the file's habit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.data.findings import SAMPLES, Finding, Level, Place
from llmkit.data.sketch import KEPT

COLUMNS = ("place", "asked", "same", "facts")
"""Numbers of 64 bits that are kept of each row."""
Numbers = np.ndarray[Any, np.dtype[np.uint64]]
LONG = 40
"""Letters of an answer from which on it is expected to end as sentences do."""
OPEN = re.compile(r"[^\W\d_]\s*\Z|[,،、]\s*\Z")
FEW, MOST_OPEN, OWN_SCRIPT, FAR = 20, 0.05, 0.95, 6.0
"""Rows that make a habit; the share of open ends within one; the share of rows in the file's script; how many robust
deviations are far."""
NEAR, COMMON = 14, 1000
"""Shingles of a sketch that near copies share; a shingle in more rows than this is how the file is."""
SCRIPTS = (
    (0x370, "Greek"),
    (0x400, "Cyrillic"),
    (0x530, "other"),
    (0x590, "Hebrew"),
    (0x600, "Arabic"),
    (0x780, "other"),
    (0x900, "Indic"),
    (0xE00, "Thai"),
    (0xE80, "other"),
    (0x1E00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, ""),
    (0x3040, "Han and kana"),
    (0xA000, "other"),
    (0xAC00, "Hangul"),
    (0xD800, ""),
    (0x20000, "Han and kana"),
)
"""Where scripts begin, as letters are numbered; what has no name holds signs."""
LANGUAGES = {
    "English": "the and of to is that it was for with you this are be not",
    "German": "der die und das ist nicht ein eine mit auf für sie ich zu den",
    "French": "le les des est une dans que pour pas vous et du au qui ce",
    "Spanish": "el los las una que por con para está y del es en se lo",
    "Portuguese": "os uma que não com para em do da é um as ao mais ou",
    "Italian": "il di che è per non una con sono gli della un del le si",
    "Dutch": "de het een van en niet dat met voor op zijn ook te aan ik",
}
"""The commonest words of languages that share a script."""
_COMMON = {name: frozenset(words.split()) for name, words in LANGUAGES.items()}
SURE = 4
"""Different ones of them that a text must hold, twice as many as of any other language, to be of it."""
NAMES = ("", "Latin", *dict.fromkeys(name for _, name in SCRIPTS if name and name != "Latin"))
_BOUNDS = np.array([start for start, _ in SCRIPTS], dtype=np.uint32)
_CODES = np.array([NAMES.index(name) for name in ("Latin", *(name for _, name in SCRIPTS))], dtype=np.uint8)


def script(text: str, plain: bool) -> int:
    """Which script most letters of a text are of, as a place in `NAMES`."""
    if plain:
        return 1
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    letters = points[((points | 0x20) - 0x61 < 26) | (points >= 0xC0)]  # signs and digits are of no script
    if not len(letters):
        return 0
    counts = np.bincount(_CODES[np.searchsorted(_BOUNDS, letters, side="right")], minlength=len(NAMES))
    counts[0] = 0
    return int(counts.argmax())


def language(text: str) -> int:
    """Which language the beginning of a text is in, counted from 1; 0 where it is not sure."""
    words = set(text[:800].lower().split())
    scores = [len(words & common) for common in _COMMON.values()]
    best = max(scores)
    if best < SURE or sorted(scores)[-2] * 2 > best:
        return 0
    return scores.index(best) + 1


def ending(answer: str) -> int:
    """0 of a short answer, 1 of one that ends as sentences do, 2 of one that ends in the middle of one."""
    if len(answer) < LONG:
        return 0
    return 2 if OPEN.search(answer, len(answer) - 8) else 1


@dataclass(frozen=True)
class Columns:
    """What is kept of all rows, a number each."""

    place: Numbers
    asked: Numbers
    same: Numbers
    facts: Numbers
    files: tuple[str, ...]
    sketches: np.ndarray[Any, np.dtype[np.uint32]]

    def where(self, index: int, detail: str = "") -> Place:
        """The place of a row."""
        place = int(self.place[index])
        return Place(self.files[place >> 40], place & (1 << 40) - 1, detail)


Odd = Iterable[tuple[int, str]]


@dataclass(frozen=True)
class Over:
    """A check over all rows: `test` gives the rows that show it, each with a detail."""

    name: str
    level: Level
    what: str
    fix: str
    test: Callable[[Columns, Columns | None], Odd]
    habit: float = 1.0

    def finding(self, rows: Columns, beside: Columns | None, total: int) -> Finding | None:
        """What it finds, or nothing. `beside` are the validation rows."""
        found = list(self.test(rows, beside))
        if not found:
            return None
        places = [rows.where(index, detail) for index, detail in found[:SAMPLES]]
        level = "info" if len(found) > self.habit * total else self.level
        return Finding(self.name, level, len(found), total, self.what, self.fix, tuple(places))


def _firsts(values: Numbers) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Of each value, the index of the first one that is equal."""
    _, first, back = np.unique(values, return_index=True, return_inverse=True)
    return first[back]


def copies(rows: Columns, beside: Columns | None) -> Odd:
    """Rows that are there before."""
    first = _firsts(rows.same)
    for index in np.flatnonzero(first != np.arange(len(first))).tolist():
        yield index, f"as {rows.where(int(first[index]))}"


def contradictions(rows: Columns, beside: Columns | None) -> Odd:
    """Rows that ask what was asked before, and answer otherwise."""
    first = _firsts(rows.asked)
    new = _firsts(rows.same) == np.arange(len(first))
    odd = (first != np.arange(len(first))) & (rows.asked != 0) & (rows.same != rows.same[first]) & new
    for index in np.flatnonzero(odd).tolist():
        yield index, f"{rows.where(int(first[index]))} asks the same"


def _alike(rows: Columns, beside: Columns) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows are, or ask, what one of the others is or asks."""
    asked: np.ndarray[Any, np.dtype[np.bool_]] = np.isin(rows.asked, beside.asked) & (rows.asked != 0)
    return asked | np.isin(rows.same, beside.same)


def overlap(rows: Columns, beside: Columns | None) -> Odd:
    """Rows that validation holds too, or whose question it asks."""
    if beside is None:
        return
    for index in np.flatnonzero(_alike(rows, beside)).tolist():
        whole = np.flatnonzero(beside.same == rows.same[index])
        other = whole if len(whole) else np.flatnonzero(beside.asked == rows.asked[index])
        yield index, f"{'as' if len(whole) else 'asked in'} {beside.where(int(other[0]))}"


def near(rows: Columns, beside: Columns | None) -> Odd:
    """Rows that are nearly a row of validation's, by their sketches.

    Two that share `NEAR` of `KEPT` shingles share one of any `KEPT - NEAR + 1` of them: the rarest are looked up.
    """
    if beside is None or not len(rows.sketches) or not len(beside.sketches):
        return
    flat = rows.sketches.ravel()
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    low, high = (np.searchsorted(ordered, beside.sketches, side=side) for side in ("left", "right"))
    rare = np.argsort(high - low, axis=1, kind="stable")[:, : KEPT - NEAR + 1]
    alike = _alike(rows, beside)  # those are told as overlap
    found: dict[int, int] = {}
    for other in np.flatnonzero(beside.sketches[:, 1] != 0).tolist():
        ranges = [(low[other, at], high[other, at]) for at in rare[other].tolist()]
        parts = [order[start:end] // KEPT for start, end in ranges if end - start <= COMMON]
        maybe = np.unique(np.concatenate(parts)) if parts else order[:0]
        shared = np.isin(rows.sketches[maybe], beside.sketches[other]).sum(axis=1)
        for index in maybe[(shared >= NEAR) & ~alike[maybe]].tolist():
            found.setdefault(index, other)
    for index in sorted(found):
        yield index, f"nearly {beside.where(found[index])}"


def lengths(rows: Columns, beside: Columns | None) -> Odd:
    """Rows far longer or shorter than the others: by median and median deviation of the logarithm."""
    sizes = (rows.facts & np.uint64(0xFFFFFFFF)).astype(np.float64)
    if len(sizes) < FEW:
        return
    logs = np.log(np.maximum(sizes, 1.0))
    middle = np.median(logs)
    spread = max(1.4826 * float(np.median(np.abs(logs - middle))), 0.1)
    for index in np.flatnonzero(np.abs(logs - middle) > FAR * spread).tolist():
        yield index, f"{int(sizes[index])} tokens, the median is {int(np.exp(middle))}"


def _byte(rows: Columns, place: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """One byte of each row's facts."""
    return ((rows.facts >> np.uint64(8 * place)) & np.uint64(0xFF)).astype(np.int64)


def open_ends(rows: Columns, beside: Columns | None) -> Odd:
    """Long answers that end in the middle of a sentence, in a file where they do not."""
    ends = _byte(rows, 5)
    odd = np.flatnonzero(ends == 2)
    if len(odd) and int((ends > 0).sum()) >= FEW and len(odd) <= MOST_OPEN * int((ends > 0).sum()):
        yield from ((index, "no end of a sentence") for index in odd.tolist())


def other_script(rows: Columns, beside: Columns | None) -> Odd:
    """Rows in another script than nearly all."""
    scripts = _byte(rows, 4)
    counts = np.bincount(scripts, minlength=len(NAMES))
    if len(scripts) < FEW or counts.max() < OWN_SCRIPT * len(scripts):
        return
    own = int(counts.argmax())
    for index in np.flatnonzero((scripts != own) & (scripts != 0)).tolist():
        yield index, f"{NAMES[scripts[index]]}, and the others {NAMES[own] or 'signs'}"


def other_language(rows: Columns, beside: Columns | None) -> Odd:
    """Rows in another language than nearly all whose language is sure."""
    spoken = _byte(rows, 6)
    counts = np.bincount(spoken, minlength=len(LANGUAGES) + 1)[1:]
    if counts.sum() < FEW or counts.max() < OWN_SCRIPT * counts.sum():
        return
    own = int(counts.argmax()) + 1
    for index in np.flatnonzero((spoken != own) & (spoken != 0)).tolist():
        yield index, f"{list(LANGUAGES)[spoken[index] - 1]}, and the others {list(LANGUAGES)[own - 1]}"


ALL = (
    Over("duplicate", "warn", "is there before, word for word", "set data.dedup=exact", copies),
    Over("contradiction", "warn", "asked before, and answered otherwise", "keep one", contradictions, 0.05),
    Over("overlap", "warn", "asked in data.valid too", "take it out of one of the two", overlap),
    Over("near overlap", "warn", "nearly a row of data.valid", "take it out of one of the two", near),
    Over("odd length", "info", "far longer or shorter than the others", "look at it", lengths),
    Over("mid-sentence", "warn", "an answer that ends in mid-sentence", "mend the answer", open_ends),
    Over("other script", "warn", "another script than nearly all rows", "look at it", other_script),
    Over("other language", "info", "another language than nearly all rows", "look at it", other_language),
)
