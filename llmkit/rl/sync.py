"""The weights that answers are drawn from: which version they are, and how they come to the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from llmkit.core.errors import PeerError
from llmkit.core.peers import Peers
from llmkit.inference.engined import EngineWriter
from llmkit.inference.request import Ask, Completion
from llmkit.parallel.chunks import Lying, Route

Feeding = Callable[[int], None]
"""Brings the weights of now, of such a version, to where answers are drawn from."""


def shared(version: int) -> None:
    """The engine reads the parameters that are trained: nothing moves."""


class Copied:
    """The engine has a model of its own; what is trained comes into it from the ranks that hold parts of it."""

    def __init__(self, peers: Peers, lying: Lying, into: Mapping[str, Tensor], device: str, route: Route) -> None:
        """`into`: the engine's parameters, by the names of those that are trained."""
        self.peers, self.lying, self.into, self.device, self.route = peers, lying, into, device, route

    def __call__(self, version: int) -> None:
        """All that is trained, chunk by chunk.

        Raises:
            PeerError: another rank is at another version.
        """
        agreed(self.peers, version)
        self.route.follow(self.lying, self.into, self.device)


def agreed(peers: Peers, version: int) -> None:
    """Sees to it that all ranks mean the same weights.

    Raises:
        PeerError: one means others.
    """
    said = peers.gather([peers.ranks.name, version])
    for name, other in said[1:]:
        if other != said[0][1]:
            what = f"{name} is to draw from version {other} of the weights, and {said[0][0]} from {said[0][1]}"
            raise PeerError(what, fix="go on from the last checkpoint")


class Versioned:
    """An engine whose answers are all of one version of the weights: the steps that they have behind them."""

    def __init__(self, writer: EngineWriter, feeding: Feeding) -> None:
        self.writer, self.feeding = writer, feeding
        self.version: int | None = None
        """None before the first, and after one that did not arrive whole."""
        self.own = -1
        """The engine's number of it."""

    def renew(self, version: int) -> None:
        """The weights are of this version from now on; what the engine has cached of others is forgotten.

        Raises:
            PeerError: another rank is at another version.
        """
        self.version = None
        update = self.writer.turns.update(lambda: self.feeding(version))
        if update.failed is not None:
            raise update.failed
        self.version, self.own = version, self.writer.turns.engine.version

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order.

        Raises:
            RequestError: one can never be answered.
            PeerError: the weights are not there, or others than an answer was made of.
        """
        for completion in self.writer.each(asks):
            if self.version is None or completion.version != self.own:
                made = f"update {completion.version} of the engine's weights"
                what = f"an answer was made of {made}, and version {self.version} of the policy is update {self.own}"
                raise PeerError(what, fix="go on from the last checkpoint")
            yield completion

    def close(self) -> None:
        """The engine goes with the last who holds it."""
        self.writer.close()
