"""What a model says to itself before it answers, between two marks; and text up to a mark."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmkit.inference.said.source import SPACE, Source, Wait
from llmkit.inference.said.told import Told


@dataclass(frozen=True)
class Thinking:
    """The two marks."""

    begin: str
    end: str

    def read(self, src: Source, told: Told) -> Wait[None]:
        """Tells all up to the end mark, or up to the end."""
        yield from src.run(SPACE)
        yield from body(src, (self.end,), told.reasoning)


def body(src: Source, ends: Sequence[str], tell: Callable[[str], None]) -> Wait[str]:
    """Tells text up to one of the marks, and gives the mark; the space before it is left out."""
    firsts = "".join({end[0] for end in ends})
    others = re.compile(rf"[^\s{re.escape(firsts)}]*")
    space: list[str] = []
    while c := (yield from src.peek()):
        if c.isspace():
            space.append(src.here(SPACE))
            continue
        src.open()
        found = (yield from src.word(ends)) if c in firsts else src.here(others) and ""
        got = src.close()
        if found:
            return found
        tell("".join(space) + got)
        space.clear()
    tell("".join(space))
    return ""
