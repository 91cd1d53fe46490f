"""Rows that could not be used, kept beside the run."""

from __future__ import annotations

from pathlib import Path

from llmkit.core.console import Console
from llmkit.core.errors import DataError
from llmkit.core.metrics import Lines


class Quarantine:
    """Collects unusable rows in a side file: where each stood, why, and its bytes."""

    def __init__(self, path: Path) -> None:
        self.lines, self.count = Lines(path), 0
        path.unlink(missing_ok=True)

    def __call__(self, error: DataError) -> None:
        """Keeps one row."""
        problem = error.problems[0]
        self.lines.add(
            {"file": problem.file, "line": problem.line, "why": problem.what, "row": _line(problem.file, problem.line)}
        )
        self.count += 1

    def tell(self, console: Console) -> None:
        """Says how many there are."""
        if self.count:
            console.notice(f"{self.count} rows are set aside in {self.lines.path.name}")


def _line(file: str, line: int) -> str:
    """The raw text of a line."""
    path = Path(file)
    if not path.is_file():
        return ""
    with path.open("rb") as source:
        for number, raw in enumerate(source, 1):
            if number == line:
                return raw.decode("utf-8", "backslashreplace").rstrip("\n")
    return ""
