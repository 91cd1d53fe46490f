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

    @property
    def apart(self) -> Apart | None:
        """Where the last ranks of a run do not train: the two sides, and this one's."""
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


class Whole(Peers, Protocol):
    """All processes of a run whose last ranks do not train."""

    def spread(self, tensor: Any, owner: int) -> None:
        """A tensor of rank `owner` in the place of those of the others, of one shape, in the host's memory."""
        ...


class Apart(Protocol):
    """A run whose last ranks do not train, seen from one of its ranks."""

    @property
    def trains(self) -> bool:
        """Whether this rank is one of those that do."""
        ...

    @property
    def own(self) -> Peers:
        """Whom a stage goes by: those that train among themselves, and of the others all."""
        ...

    @property
    def whole(self) -> Whole:
        """All ranks."""
        ...

    @property
    def desk(self) -> Peers | None:
        """The main rank with those that do not train; none on the others."""
        ...


class Alone:
    """A run of one process."""

    ranks = Ranks()
    apart: Apart | None = None

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
