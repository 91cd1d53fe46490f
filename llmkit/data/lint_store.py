"""What lint saw of some rows, as plain values that can be kept and taken up again."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

from llmkit.data.findings import Place
from llmkit.data.lint import Hits, Lint

HELD = ("hits", "letters", "sizes", "files", "columns", "sketched")
"""The parts of an observer that grow with what it sees."""


def state(lint: Lint) -> dict[str, Any]:
    """All that an observer saw."""
    hits = {name: [h.count, [[p.file, p.line, p.detail] for p in h.places]] for name, h in lint.hits.items()}
    arrays = {name: column.tobytes() for name, column in lint.columns.items()}
    said = {"hits": hits, "letters": dict(lint.letters), "sizes": dict(lint.sizes), "files": list(lint.files)}
    return said | {"columns": arrays, "sketched": lint.sketched.tobytes()}


def restored(empty: Lint, held: Mapping[str, Any]) -> Lint:
    """The observer again; `empty` saw nothing yet."""
    empty.hits = {
        name: Hits(count, [Place(file, line, detail) for file, line, detail in places])
        for name, (count, places) in held["hits"].items()
    }
    empty.letters, empty.sizes = Counter(held["letters"]), Counter(held["sizes"])
    empty.files = {name: index for index, name in enumerate(held["files"])}
    for name, column in held["columns"].items():
        empty.columns[name] = array("Q", column)
    empty.sketched = array("I", held["sketched"])
    return empty
