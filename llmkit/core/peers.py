"""What the processes of one run say to each other, beside tensors: small JSON values, and where each of them is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from llmkit.core.errors import LlmkitError
from llmkit.core.ranks import Ranks


class Peers(Protocol):
    """The processes of a run, seen from one of them. All but `phase` and `alone` are called by every rank alike."""

    @property
    def ranks(self) -> Ranks:
        """Which of them this is."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order."""
        ...

    def share(self, value: Any) -> Any:
        """The main rank's JSON value; what the others give is not read."""
        ...

    def any(self, why: str) -> str:
        """The first reason that a rank gives, or nothing: the same on all of them."""
        ...

    def barrier(self, where: str) -> None:
        """Every rank is there when this returns."""
        ...

    def phase(self, name: str, step: int = 0) -> None:
        """Tells those who watch where this rank is now: start, data, forward, backward, reduce,
        step, log, save, evaluate, exit."""
        ...

    def alone(self, where: str) -> AbstractContextManager[None]:
        """Around work of this rank that the others wait for: a fault in it ends them too, and is told."""
        ...

    def at_work(self, folder: Path) -> AbstractContextManager[None]:
        """Around a stage, whose log lies in `folder`: a fault of this rank is told to the others, theirs end it."""
        ...

    def closing(self, how: Callable[[LlmkitError], bool | None] | None) -> None:
        """What leaves a stage's status when the others end this process; it says whether there was one to leave."""
        ...


class Alone:
    """A run of one process."""

    ranks = Ranks()

    def gather(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]

    def share(self, value: Any) -> Any:
        """Its own value."""
        return value

    def any(self, why: str) -> str:
        """Its own."""
        return why

    def barrier(self, where: str) -> None:
        """Nobody to wait for."""

    def phase(self, name: str, step: int = 0) -> None:
        """Nobody watches."""

    def alone(self, where: str) -> AbstractContextManager[None]:
        """Nobody waits."""
        return nullcontext()

    def at_work(self, folder: Path) -> AbstractContextManager[None]:
        """Nobody to tell."""
        return nullcontext()

    def closing(self, how: Callable[[LlmkitError], bool | None] | None) -> None:
        """Nobody ends this process."""
