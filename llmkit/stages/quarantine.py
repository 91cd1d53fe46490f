"""Rows that could not be used, kept beside the run."""

from __future__ import annotations

from pathlib import Path

from llmkit.core.console import Console
from llmkit.core.metrics import Lines
from llmkit.data.rows import BadRow


class Quarantine:
    """Collects unusable rows in a side file: where each stood, why, and its text (bytes that are no UTF-8 escaped)."""

    def __init__(self, path: Path) -> None:
        self.lines, self.count = Lines(path), 0
        self.kept: set[tuple[str, int]] = set()
        """Places of rows that are there: a stream that goes on reads some rows again."""
        path.unlink(missing_ok=True)

    def __call__(self, error: BadRow) -> None:
        """Keeps one row."""
        problem = error.problems[0]
        if (place := (problem.file, problem.line)) in self.kept:
            return
        self.kept.add(place)
        row = error.text.decode("utf-8", "backslashreplace").rstrip("\n")
        self.lines.add({"file": problem.file, "line": problem.line, "why": problem.what, "row": row})
        self.count += 1

    def tell(self, console: Console) -> None:
        """Says how many there are."""
        if self.count:
            console.notice(f"{self.count} rows are set aside in {self.lines.path.name}")
