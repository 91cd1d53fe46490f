"""The weights that answers are drawn from: which version they are, and how they come to the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from llmkit.core.errors import PeerError
from llmkit.core.peers import Peers
from llmkit.inference.engined import EngineWriter
from llmkit.inference.request import Ask, Completion, Output
from llmkit.inference.writer import Writer
from llmkit.parallel.chunks import Lying, Route

Feeding = Callable[[int], None]
"""Brings the weights of now, of such a version, to where answers are drawn from."""


class Drawn(Writer, Protocol):
    """What answers are drawn by, all of them from weights of one version: the steps that they have behind them."""

    version: int | None
    """None before the first, and after one that did not arrive whole."""

    def renew(self, version: int) -> None:
        """The weights are of this version from now on: called by every rank."""
        ...


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


class Published:
    """A server whose answers are all of one version of the weights, which has a name of its own where it is an
    adapter."""

    def __init__(self, writer: Writer, peers: Peers, publish: Callable[[int], str], temperature: float) -> None:
        """`publish`: called by every rank, has a version where the server reads it, and gives the name of its adapter,
        or nothing where all weights are changed in place."""
        self.writer, self.peers, self.publish = writer, peers, publish
        self.told = temperature == 1.0
        """Whether log-probabilities of the model are those of the law that it draws from."""
        self.version: int | None = None
        self.name = ""

    def renew(self, version: int) -> None:
        """The server's weights are of this version from now on.

        Raises:
            PeerError: another rank is at another version.
            ModelError: the server does not take them.
        """
        self.version = None
        agreed(self.peers, version)
        self.name = self.publish(version)
        self.version = version

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order.

        Raises:
            RequestError: one can never be answered.
            ResourceError: the server cannot be reached.
            PeerError: it has no version of the weights.
        """
        if self.version is None:
            raise PeerError("the server's weights are of no known version", fix="go on from the last checkpoint")
        for completion in self.writer.each(replace(ask, adapter=self.name) for ask in asks):
            yield replace(completion, outputs=tuple(map(self._lawful, completion.outputs)))

    def _lawful(self, output: Output) -> Output:
        """With what is known of the law: a server tells the model's own log-probabilities."""
        if not self.told:
            return output
        return replace(output, logprobs=tuple(replace(one, sampling_logprob=one.logprob) for one in output.logprobs))

    def close(self) -> None:
        """Waits for what is under way."""
        self.writer.close()
