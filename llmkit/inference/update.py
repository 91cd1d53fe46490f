"""A change of weights that waits for its turn between two steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmkit.core.errors import LlmkitError

FORESEEN = (LlmkitError, OSError, ValueError, KeyError, RuntimeError)
"""What a load fails with: files, names, shapes, memory."""


@dataclass(eq=False)
class Update:
    """`work` changes the weights in place: all of them or, when it raises, none."""

    work: Callable[[], None]
    drain: bool
    """Whether what has begun ends first, on the weights that it began with."""
    done: bool = False
    failed: Exception | None = None
    """Why it was not carried out, once it is done."""

    def carry_out(self) -> bool:
        """Whether the weights are others now."""
        self.done = True
        try:
            self.work()
        except FORESEEN as cause:
            self.failed = cause
        return self.failed is None
