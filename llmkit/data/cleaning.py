"""Nodes of what is looked for in rows, and left out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import Conflict, config, setting

if TYPE_CHECKING:
    from llmkit.data.near import Left
    from llmkit.data.rows import Row

    Sieve = Callable[[Row, str], Left | None]


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


@config
class NoDedup:
    """Every row stays."""

    kind: Literal["none"] = "none"

    def sieve(self) -> Sieve | None:
        """None: nothing is left out."""
        return None


@config
class ExactDedup:
    """Rows that say what an earlier one says, word for word, are left out."""

    kind: Literal["exact"] = "exact"

    def sieve(self) -> Sieve | None:
        """Says of each row, in order, whether it is left out."""
        from llmkit.data.near import Copies

        return Copies()


@config
class MinHashDedup:
    """Rows that say nearly what an earlier one says are left out, by MinHash (needs `pip install datasketch`)."""

    kind: Literal["minhash"] = "minhash"
    threshold: float = setting(default=0.8, above=0.0, most=1.0)
    """Jaccard similarity of two rows' runs of words from which on they are near copies."""
    ngram: int = setting(default=5, least=1, most=64)
    """Words of a run."""
    permutations: int = setting(default=128, least=16, most=1024)
    """Numbers of a signature: the estimate is off by about 0.5 / sqrt(permutations)."""

    def sieve(self) -> Sieve | None:
        """Says of each row, in order, whether it is left out."""
        from llmkit.data.near import NearCopies

        return NearCopies(self.threshold, self.ngram, self.permutations)


Dedup = NoDedup | ExactDedup | MinHashDedup


@config
class Contamination:
    """When a training row holds an evaluation's question (arXiv 2411.15124, 3.1)."""

    ngram: int = setting(default=8, least=2, most=64)
    """Words of a run; shorter questions are looked for whole."""
    share: float = setting(default=0.5, above=0.0, most=1.0)
    """Share of a question's runs that a row must hold."""
