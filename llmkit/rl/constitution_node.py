"""The words of a constitution: principles, each with how it is looked for, mended and preferred."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.core.config import Conflict, config


@config
class Principle:
    """One of them, in words that are put to models."""

    name: str
    """By which it is told in figures."""
    critique: str
    """What an answer is looked at for."""
    revision: str
    """How an answer that goes against it is written anew."""
    preference: str
    """Which of two answers is the better one."""

    def problems(self) -> Iterator[Conflict]:
        """Words that are missing."""
        for key in ("name", "critique", "revision", "preference"):
            if not getattr(self, key).strip():
                yield Conflict(key, "is empty", "write a sentence")


@config
class Constitution:
    """Principles, of which some are drawn for each row."""

    name: str
    principles: tuple[Principle, ...]

    def problems(self) -> Iterator[Conflict]:
        """None at all, or two of one name."""
        names = [one.name for one in self.principles]
        if not names:
            yield Conflict("principles", "is empty", "write at least one")
        for at, name in enumerate(names):
            if name in names[:at]:
                yield Conflict(f"principles.{at}.name", f"{name} is there already", "give each its own name")
