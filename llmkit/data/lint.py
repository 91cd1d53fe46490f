"""Lint: an observer that sees each row once, as it was read, rendered and tokenised, and says what is odd about them.

It keeps counts, some places, and a few numbers a row: memory does not grow with what rows hold. Two of them, of two
parts of a data set, merge into what one would have said of the whole.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkit.data.encode import Rendered
from llmkit.data.findings import SAMPLES, Finding, Place, Seen, Tokens
from llmkit.data.lint_rows import CHECKS, refusal
from llmkit.data.lint_sets import ALL, COLUMNS, Columns, ending, language, script
from llmkit.data.render import Renderer
from llmkit.data.rows import Raw, Row, Unusable
from llmkit.data.sketch import KEPT, digest, sketch

TRIED, EVERY = 8, 1000
"""Rows whose question is rendered apart: the first, and one of so many."""
MOST = 1 << 21
"""Rows whose numbers are kept, of which the checks over all rows speak: a stream may have no end."""
PROMPT = ("generation prompt", "the text that is sent in use is no beginning of the trained one", "mend the template")


@dataclass
class Hits:
    """How often something was found, and the first places."""

    count: int = 0
    places: list[Place] = field(default_factory=list)

    def add(self, place: Place) -> None:
        """Counts one."""
        self.count += 1
        if len(self.places) < SAMPLES:
            self.places.append(place)


class Lint:
    """What is odd about the rows that it saw. `sketches`: keep what near copies in another data set are found by."""

    def __init__(self, renderer: Renderer, max_length: int, overflow: str = "drop", sketches: bool = False) -> None:
        tokenizer = renderer.tokenizer
        special = frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
        ends = special | ({tokenizer.eos_token_id} - {None})
        self.tokens = Tokens(tokenizer.bos_token_id, tokenizer.eos_token_id, ends, max_length, overflow)
        self.renderer, self.sketches = renderer, sketches
        self.told: set[str] = set()
        """What was found of the last row: a row counts once, however many examples there are of it."""
        self.hits: dict[str, Hits] = {}
        self.letters: Counter[str] = Counter()
        """Characters by role."""
        self.sizes: Counter[str] = Counter()
        """Rows, tokens, trained tokens."""
        self.files: dict[str, int] = {}
        self.columns = {name: array("Q") for name in COLUMNS}
        self.sketched = array("I")

    def see(
        self, raw: Raw, row: Row, rendered: Rendered, ids: Sequence[int], weights: Sequence[float], first: bool = True
    ) -> None:
        """One example; `first` of its row, which a template may make several of."""
        seen = self._seen(row, rendered, ids, weights)
        if first:
            self.told = set()
        for check in CHECKS:
            if check.name not in self.told and (found := check.test(seen)):
                self.told.add(check.name)
                self._hit(check.name, raw.file, raw.line, found)
        self.sizes["tokens"] += len(ids)
        self.sizes["trained"] += len(weights) - weights.count(0.0) if isinstance(weights, list) else _trained(weights)
        if first:
            self._row(raw, seen)

    def refused(self, file: str, line: int, reason: str, name: str = "") -> None:
        """A row that cannot be used; under the name of its own that one has which cannot be read."""
        self.sizes["rows"] += 1
        name = name or refusal(reason)
        self._hit(name, file, line, reason)

    def note(self, name: str, file: str, line: int, detail: str) -> None:
        """A row that it saw, and that is left out for a reason of the recipe's."""
        self._hit(name, file, line, detail)

    def merge(self, other: Lint) -> None:
        """Takes in what was seen of the rows that come after."""
        moved = np.array([self._file(name) for name in other.files], dtype=np.uint64)
        for name, hits in other.hits.items():
            mine = self.hits.setdefault(name, Hits())
            mine.count += hits.count
            mine.places = (mine.places + hits.places)[:SAMPLES]
        self.letters.update(other.letters)
        self.sizes.update(other.sizes)
        for name, column in other.columns.items():
            numbers = np.frombuffer(column, dtype=np.uint64)[: MOST - len(self.columns[name])]
            if name == "place" and len(numbers):
                numbers = numbers & _LINE | moved[numbers >> _BITS] << _BITS
            self.columns[name].frombytes(numbers.tobytes())
        self.sketched.extend(other.sketched[: KEPT * MOST - len(self.sketched)])

    def table(self) -> Columns:
        """The numbers of all rows."""
        held = {name: np.frombuffer(column, dtype=np.uint64) for name, column in self.columns.items()}
        marks = np.frombuffer(self.sketched, dtype=np.uint32).reshape(-1, KEPT)
        return Columns(**held, files=tuple(self.files), sketches=marks)

    def findings(self, beside: Lint | None = None, allow: Sequence[str] = ()) -> tuple[Finding, ...]:
        """All that was found, what matters first; `beside` are the rows that these are validated by."""
        rows = self.sizes["rows"]
        table, other = self.table(), beside.table() if beside is not None else None
        made = [self._finding(*facts, rows) for facts in _FACTS if facts[0] in self.hits]
        made += [finding for check in ALL if (finding := check.finding(table, other, rows)) is not None]
        kept = [finding for finding in made if finding.name not in allow]
        return tuple(sorted(kept, key=lambda finding: (finding.level != "warn", -finding.count, finding.name)))

    def shares(self) -> dict[str, float]:
        """About the share of tokens of each role, by its letters, and the exact share of those that are trained."""
        total = sum(self.letters.values()) or 1
        shares = {role: count / total for role, count in sorted(self.letters.items())}
        return shares | {"trained": self.sizes["trained"] / max(1, self.sizes["tokens"])}

    def _finding(self, name: str, level: Any, what: str, fix: str, habit: float, rows: int) -> Finding:
        hits = self.hits[name]
        common = hits.count > habit * max(rows, 1) and rows >= SAMPLES
        return Finding(name, "info" if common else level, hits.count, rows, what, fix, tuple(hits.places))

    def _hit(self, name: str, file: str, line: int, detail: str) -> None:
        self.hits.setdefault(name, Hits()).add(Place(file, line, detail))

    def _file(self, name: str) -> int:
        return self.files.setdefault(name, len(self.files))

    def _seen(self, row: Row, rendered: Rendered, ids: Sequence[int], weights: Sequence[float]) -> Seen:
        parts = [_said(message) for message in row.messages] or [row.prompt, row.completion]
        text, last = "\n".join(parts), row.messages[-2] if len(row.messages) > 1 else {}
        asked = _said(last) if row.messages else row.prompt
        return Seen(row, rendered, ids, weights, text, asked, row.answer, text.isascii(), self.tokens)

    def _row(self, raw: Raw, seen: Seen) -> None:
        row, columns = seen.row, self.columns
        self.sizes["rows"] += 1
        asked, answer = _keys(row)
        before = digest(asked) if asked else 0
        facts = script(seen.text, seen.plain) << 32 | ending(seen.answer) << 40 | language(seen.text) << 48
        if len(columns["place"]) < MOST:
            columns["place"].append(self._file(raw.file) << 40 | raw.line)
            columns["asked"].append(before)
            columns["same"].append(digest(f"{before}\x1d{answer}"))
            columns["facts"].append(len(seen.ids) | facts)
        for role, size in _letters(row, seen.rendered.text):
            self.letters[role] += size
        if self.sketches and len(self.sketched) < KEPT * MOST:
            marks = sketch(seen.text)
            self.sketched.extend(marks.tolist() if len(marks) else [0] * KEPT)
        if row.id < TRIED or row.id % EVERY == 0:
            self._sent(raw, seen)

    def _sent(self, raw: Raw, seen: Seen) -> None:
        """Whether what is sent in use, up to where an answer begins, is how the trained text begins."""
        row = seen.row
        if not row.messages:
            return
        try:
            sent = self.renderer.prompt(row.question, row.tools).text
            whole = self.renderer.turns(row)[-1].text
        except Unusable:
            return
        if row.messages[-1]["role"] == "assistant" and not whole.startswith(sent):
            self._hit(PROMPT[0], raw.file, raw.line, f"ends in {sent[-20:]!a}")


_BITS, _LINE = np.uint64(40), np.uint64((1 << 40) - 1)
_REFUSALS: Mapping[str, tuple[str, str]] = {
    "empty": ("a text of it is empty", "fill it, or leave the row out"),
    "role order": ("roles in the wrong order, or unknown", "put user and assistant in turns"),
    "nothing to learn": ("no token of it is trained", "raise a weight, or leave it out"),
    "special text": ("text of special tokens, kept as plain text", "take it out"),
    "surrogates": ("half a letter, which no UTF-8 has", "write the letter whole"),
    "generation prompt": PROMPT[1:],
    "weights": ("weights that contradict, or are none", "give weight: 0 to 1"),
    "unusable": ("cannot be used", "mend the row"),
    "broken": ("cannot be read", "mend the line"),
}
_REMOVED = {
    "removed copy": "left out: an earlier row is the same",
    "removed near copy": "left out: an earlier row is nearly the same",
    "removed contaminated": "left out: it holds what an evaluation asks",
}
_OWN = {check.name for check in CHECKS}
_FACTS: tuple[tuple[str, Any, str, str, float], ...] = (
    *((check.name, check.level, check.what, check.fix, check.habit) for check in CHECKS),
    *((name, "warn", *said, 1.0) for name, said in _REFUSALS.items() if name not in _OWN),
    *((name, "info", what, "as data says", 1.0) for name, what in _REMOVED.items()),
)
NAMES = tuple(sorted({"template", *(name for name, *_ in _FACTS), *(check.name for check in ALL)}))
"""All that lint can find."""


def _trained(weights: Sequence[float]) -> int:
    return int(np.count_nonzero(np.asarray(weights)))


def _said(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _keys(row: Row) -> tuple[str, str]:
    """(question, answer) as texts that are equal where the rows are."""
    if not row.messages:
        return row.prompt, row.completion
    parts = [f"{m['role']}\x1e{_said(m)}{_rest(m)}" for m in row.messages]
    tools = repr(row.tools) if row.tools else ""
    return "\x1d".join([tools, *parts[:-1]]), parts[-1]


def _rest(message: Mapping[str, Any]) -> str:
    """What else a message says."""
    if len(message) <= 2:
        return ""
    return repr(sorted((k, v) for k, v in message.items() if k not in ("role", "content")))


def _letters(row: Row, text: str) -> list[tuple[str, int]]:
    if not row.messages:
        return [("prompt", len(row.prompt)), ("completion", len(row.completion))]
    made = [(str(m["role"]), len(_said(m))) for m in row.messages]
    return [*made, ("template", max(0, len(text) - sum(size for _, size in made)))]
