"""Nodes of what is looked for in rows, and left out of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from llmkit.core.config import Conflict, config


@config
class Linting:
    """Lint: what is odd about the rows, with counts and places."""

    _short: ClassVar[str] = "level"
    level: Literal["warn", "error", "off"] = "warn"
    """`error` stops at any finding that is a warning; `off` looks for none."""
    allow: tuple[str, ...] = ()
    """Names of findings that are meant to be."""

    def problems(self) -> Iterator[Conflict]:
        """Names that nothing is called."""
        if not self.allow:
            return
        from llmkit.data.lint import NAMES

        for name in self.allow:
            if name not in NAMES:
                yield Conflict("allow", f"no finding is called {name}", f"use {', '.join(NAMES)}")
