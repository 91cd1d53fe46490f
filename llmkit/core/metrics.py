"""Lines of JSON: one object a line, floats by `repr`, so that equal runs give equal text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.core.files import as_json, refused


class Lines:
    """A file of JSON lines that a run appends to and that a resumed run cuts back to its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, line: Mapping[str, Any]) -> None:
        """One line, on its way to the disk when this returns; what is not finite becomes text.

        Raises:
            ResourceError: the disk refuses.
        """
        try:
            with self.path.open("ab") as file:
                file.write((as_json(line) + "\n").encode())
        except OSError as cause:
            raise refused(cause, "writing", self.path) from cause

    def size(self) -> int:
        """Bytes so far: what a checkpoint remembers."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drops all behind the first `size` bytes."""
        if self.size() > size:
            os.truncate(self.path, size)

    def sync(self) -> None:
        """On the disk when this returns: a checkpoint must not remember lines that a power loss takes."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last one is left out."""
        if not self.path.exists():
            return []
        text = self.path.read_text("utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def after(self, head: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The lines after a first one that says what they are of. A file that begins otherwise begins anew; a torn or
        damaged line is cut off with all behind it, so that the next one stands by itself.

        Raises:
            ResourceError: the disk refuses.
        """
        found, size = list[dict[str, Any]](), 0
        for line in self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else ():
            if (said := _said(line)) is None:
                break
            found.append(said)
            size += len(line) + 1
        self.cut(size)
        first, *rest = found or [{}]
        if first == head:
            return rest
        self.cut(0)
        self.add(head)
        return []


def _said(line: bytes) -> dict[str, Any] | None:
    """What a line says, or None where a disk or a power loss made something else of it."""
    try:
        said = json.loads(line.decode())
    except ValueError:
        return None
    return said if isinstance(said, dict) else None
