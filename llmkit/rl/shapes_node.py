"""The `shape` union of the reward `length`: what a length is worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from llmkit.core.config import Conflict, config, setting


@config
class Target:
    """1 at a length, less by a straight line to 0 at `slack` beside it."""

    kind: Literal["target"] = "target"
    length: int = setting(least=0)
    slack: int = setting(least=1)

    def worth(self, length: int) -> float:
        """From 0 to 1."""
        return max(0.0, 1.0 - abs(length - self.length) / self.slack)


@config
class AtMost:
    """1 up to a length, and 0 beyond it."""

    kind: Literal["at_most"] = "at_most"
    length: int = setting(least=0)

    def worth(self, length: int) -> float:
        """0 or 1."""
        return float(length <= self.length)


@config
class Overlong:
    """A punishment that begins softly: 0 up to `length - soft`, then a straight line down to -1 at `length`, and -1
    beyond it (DAPO, arXiv:2503.14476, equation 13)."""

    kind: Literal["overlong"] = "overlong"
    length: int = setting(least=1)
    """The longest that is hoped for: `rollout.max_tokens`, or a little less."""
    soft: int = setting(least=0)
    """How much before it the punishment begins."""

    def problems(self) -> Iterator[Conflict]:
        """More room than there is."""
        if self.soft > self.length:
            yield Conflict("soft", f"{self.soft} is more than {self.length}", "give less", "length")

    def worth(self, length: int) -> float:
        """From -1 to 0."""
        if length > self.length:
            return -1.0
        return min(0.0, (self.length - self.soft - length) / self.soft) if self.soft else 0.0


Shape = Target | AtMost | Overlong
