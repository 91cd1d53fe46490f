"""What rewards hold while they score: processes, models and generators, each opened where it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, Protocol, TypeVar, cast

from llmkit.core.run import Grants


class Closes(Protocol):
    """What holds something."""

    def close(self) -> None:
        """Gives it back."""
        ...


T = TypeVar("T", bound=Closes)


class Bench:
    """Kept open over all steps of a run; `with Bench(...) as bench` gives back what it holds."""

    def __init__(self, grants: Grants = Grants(), device: str = "cpu", precision: str = "auto") -> None:
        self.grants, self.device, self.precision = grants, device, precision
        self.held: dict[str, Any] = {}
        self.turn = RLock()
        """Held while something is scored: a thread that draws ahead and an evaluation ask the same processes."""
        self.told: dict[str, float] = {}
        """Figures of the reward that scored last, beside its scores."""

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kept(self, key: str, make: Callable[[], T]) -> T:
        """What was made under this key, or is made now."""
        if key not in self.held:
            self.held[key] = make()
        return cast(T, self.held[key])

    def close(self) -> None:
        """Ends all of it."""
        while self.held:
            self.held.popitem()[1].close()
