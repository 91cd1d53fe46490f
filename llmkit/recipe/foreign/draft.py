"""A recipe in the making: what a foreign configuration says, what of it was taken, and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Fate = Literal["taken", "changed", "needless", "lost"]
"""Of a foreign key: it has its counterpart; it has one that is not quite the same; it asks for what is so anyway, or
for nothing that a result depends on; it has none."""


@dataclass(frozen=True)
class Note:
    """What became of one key."""

    fate: Fate
    key: str
    line: int
    value: Any
    what: str


@dataclass
class Draft:
    """Reads `said` key by key into `recipe`; what nobody read is lost, and told so."""

    tool: str
    said: Mapping[str, Any]
    lines: Mapping[str, int]
    folder: Path = Path()
    """Where the configuration lies: its relative paths begin there or in the working folder."""
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """Files to be written beside the recipe."""

    def get(self, key: str, default: Any = None) -> Any:
        """What a key says; nothing said, or null, is the default."""
        value = self.said.get(key)
        return default if value is None else value

    def given(self, *keys: str) -> list[str]:
        """Those of some keys that say something."""
        return [key for key in keys if self.get(key) is not None]

    def put(self, path: str, value: Any, *keys: str, changed: str = "") -> None:
        """Sets a key of the recipe, taken from foreign ones; `changed` says what is not the same."""
        *parents, last = path.split(".")
        place = self.recipe
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
        for key in keys:
            self.tell("changed" if changed else "taken", key, changed or path)

    def tell(self, fate: Fate, key: str, what: str) -> None:
        """What became of a key."""
        self.notes.append(Note(fate, key, self.lines.get(key, 0), self.said.get(key), what))

    def rename(self, names: Mapping[str, str]) -> None:
        """Keys whose values are ours under another name."""
        for theirs, ours in names.items():
            if self.get(theirs) is not None:
                self.put(ours, self.get(theirs), theirs)

    def needless(self, reasons: Mapping[str, str]) -> None:
        """Keys that ask for what is so anyway, with the reason."""
        for key, why in reasons.items():
            if self.left(key):
                self.tell("needless", key, why)

    def lost(self, reasons: Mapping[str, str]) -> None:
        """Keys that are known and have no counterpart, with what to do instead; what turns nothing on is needless."""
        for key, why in reasons.items():
            if self.left(key):
                idle = self.get(key) in (False, [], {}, "", "no", "none")
                self.tell("needless" if idle else "lost", key, "is turned off" if idle else why)

    def left(self, key: str) -> bool:
        """Whether a key says something that nobody has read."""
        return self.get(key) is not None and all(note.key.partition(".")[0] != key for note in self.notes)

    def close(self) -> None:
        """Whatever was not read is lost; empty keys say nothing."""
        self.lost({key: f"is no key of {self.tool} that is known here" for key in self.said})
        self.notes.sort(key=lambda note: note.line)
