"""One scheduler over several ranks that hold a model together: the first rank tells each step, all of them compute it.

What travels before a step is plain JSON; hidden states of the places whose logits are wanted, and the logits, travel as
tensors. Each rank keeps the keys and values of its heads in a store of its own, whose blocks have the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from llmkit.core.errors import LlmkitError, ModelError, PeerError
from llmkit.core.types import KeyValueStore, Paged, Span
from llmkit.inference.runner import Forward

if TYPE_CHECKING:
    from llmkit.inference.adapters import Bank

Said = Mapping[str, Any]


class Store(KeyValueStore, Protocol):
    """`blocks` blocks of keys and values, of `size` tokens each."""

    blocks: int
    size: int

    def copy(self, source: int, target: int) -> None:
        """Copies all that a block holds into another."""
        ...

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies keys and values from slots (block * size + place in it) to slots, all of them at once."""
        ...

    def resize(self, blocks: int) -> None:
        """As many blocks; what they held is gone."""
        ...


class Wire(Protocol):
    """Between the first rank and the others; all of them make the same calls."""

    @property
    def first(self) -> bool:
        """Whether this is the one that schedules."""
        ...

    def tell(self, value: Any) -> Any:
        """The first rank's JSON value."""
        ...

    def spread(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, in the place of those of the others, of one shape."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Those of all ranks, in their order, of one shape but for the last dimension."""
        ...

    def any(self, why: str) -> str:
        """The first reason that a rank gives, or nothing."""
        ...

    def naming(self) -> AbstractContextManager[None]:
        """Around what the ranks compute: who does not go on is named."""
        ...


@dataclass(frozen=True)
class Part:
    """What a rank has of the model."""

    forward: Forward
    width: int
    """Of a hidden state."""
    shares_head: bool
    """Whether it makes the logits of some rows of the vocabulary alone."""


@dataclass(frozen=True)
class Ticket:
    """An adapter that every rank has read and none has put yet."""

    number: int
    virtual: int
    mark: str


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Rank:
    """What one rank does for each thing that is told."""

    def __init__(self, part: Part, store: Store, bank: Bank, wire: Wire, aside: Callable[[int, int], Store]) -> None:
        """`aside` makes a store of blocks of a size, for what is computed beside the steps."""
        self.forward, self.part, self.store, self.bank, self.wire = part.forward, part, store, bank, wire
        self.aside = aside
        self.read_: dict[int, Any] = {}
        """Adapters by their tickets."""
        self.verbs: Mapping[str, Callable[[Said], Any]] = {
            "hidden": self.hidden,
            "logits": self.logits,
            "copy": lambda said: self.store.copy(said["source"], said["target"]),
            "move": lambda said: self.store.move(said["sources"], said["targets"]),
            "resize": lambda said: self.store.resize(said["blocks"]),
            "read": self.read,
            "put": lambda said: self.bank.put(said["key"], self.read_.pop(said["number"])),
            "leave": lambda said: self.read_.pop(said["number"]),
            "drop": lambda said: self.bank.drop(said["key"]),
        }

    def do(self, said: Said) -> Any:
        """Carries out what the first rank told."""
        return self.verbs[said["do"]](said)

    def hidden(self, said: Said) -> Tensor:
        """Hidden states (N, H) of a step."""
        device = self.forward.device
        spans = tuple(Span(*map(_tupled, span)) for span in said["spans"])
        tokens, positions = (torch.tensor(said[key], device=device) for key in ("tokens", "positions"))
        own = self.store if said["aside"] is None else self.aside(*said["aside"])
        with self.wire.naming():
            return self.forward.hidden(tokens, positions, Paged(own, spans), said["adapters"])

    def logits(self, said: Said) -> Tensor:
        """(R, V) from this rank's rows of the vocabulary and those of the others."""
        kind = getattr(torch, said["dtype"])
        hidden = said.get("hidden")
        if hidden is None:
            hidden = torch.empty(said["count"], self.part.width, dtype=kind, device=self.forward.device)
        if not self.part.shares_head:
            return self.forward.logits(hidden) if self.wire.first else hidden
        with self.wire.naming():
            return torch.cat(self.wire.gather(self.forward.logits(self.wire.spread(hidden.contiguous()))), 1)

    def read(self, said: Said) -> Ticket:
        """Reads an adapter, if all ranks can.

        Raises:
            ModelError: one cannot.
        """
        failed: LlmkitError | None = None
        try:
            self.read_[said["number"]] = self.bank.read(Path(said["folder"]))
        except LlmkitError as cause:
            failed = cause
        why = self.wire.any("" if failed is None else str(failed))
        if failed is not None:
            raise failed
        if why:
            del self.read_[said["number"]]
            raise ModelError(f"another rank cannot read it ({why})", fix="give all of them the same files")
        made = self.read_[said["number"]]
        return Ticket(said["number"], made.virtual, made.mark)


def follow(rank: Rank) -> None:
    """Does what the first rank tells until it says that it is over.

    Raises:
        PeerError: another rank is gone.
    """
    with torch.no_grad():
        while (said := rank.wire.tell(None))["do"] != "end":
            try:
                rank.do(said)
            except ModelError:
                if said["do"] != "read":  # an adapter that cannot be read is the first rank's to tell
                    raise


class Led:
    """All ranks as the engine's `Forward`, the copying of its blocks, and the bank of its adapters; on the first rank.

    Every call is one exchange with the others, whichever thread makes it.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank, self.lock, self.count = rank, threading.RLock(), 0
        self.open = True
        self.lost: BaseException | None = None
        """Why the others wait for what will not come."""

    @property
    def device(self) -> torch.device:
        """Of this rank's part."""
        return self.rank.forward.device

    @property
    def trees(self) -> bool:
        """As of this rank's part."""
        return self.rank.forward.trees

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Paged, adapters: Sequence[str]) -> Tensor:
        """Last hidden states (N, H) of tokens (N,) at positions (N,). Where `attend` has another store than the ranks'
        own, each of them makes one of as many blocks, of which nothing is kept.

        Raises:
            PeerError: a rank is gone; it is named.
        """
        given = cast(Store, attend.store)
        made: Tensor = self._all(
            {
                "do": "hidden",
                "aside": None if given is self.rank.store else [given.blocks, given.size],
                "tokens": tokens.tolist(),
                "positions": positions.tolist(),
                "spans": [astuple(span) for span in attend.spans],
                "adapters": list(adapters),
            }
        )
        return made

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R, V)."""
        told = {"do": "logits", "count": len(hidden), "dtype": str(hidden.dtype).removeprefix("torch.")}
        made: Tensor = self._all(told, hidden=hidden)
        return made

    def copy(self, source: int, target: int) -> None:
        """Copies a block of every rank's store."""
        self._all({"do": "copy", "source": source, "target": target})

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Moves keys and values in every rank's store."""
        self._all({"do": "move", "sources": list(sources), "targets": list(targets)})

    def resize(self, blocks: int) -> None:
        """As many blocks in every rank's store; what they held is gone."""
        self._all({"do": "resize", "blocks": blocks})

    def read(self, folder: Path) -> Ticket:
        """An adapter of a folder that all ranks see.

        Raises:
            ModelError: one of them cannot read it, or it does not fit.
        """
        with self.lock:
            self.count += 1
            made: Ticket = self._all({"do": "read", "number": self.count, "folder": str(folder)})
            return made

    def made(self, like: str, tensors: Mapping[str, Tensor]) -> Ticket:
        """Raises: ModelError: weights do not travel."""
        raise ModelError(
            "weights that are handed over do not reach other ranks", fix="load them from a folder", key="tensor"
        )

    def put(self, key: str, adapter: Ticket) -> None:
        """Keeps what was read."""
        self._all({"do": "put", "key": key, "number": adapter.number})

    def leave(self, adapter: Ticket) -> None:
        """No rank keeps what it has read."""
        self._all({"do": "leave", "number": adapter.number})

    def drop(self, key: str) -> None:
        """Nobody needs it any longer."""
        self._all({"do": "drop", "key": key})

    def close(self) -> None:
        """The others end, if they are there and listen."""
        with self.lock:
            if self.open:
                self.open = False
                if self.lost is None:
                    self.rank.wire.tell({"do": "end"})

    def _all(self, said: Said, **here: Any) -> Any:
        """What is `here` is not sent."""
        with self.lock:
            self._check()
            try:
                self.rank.wire.tell(said)
                return self.rank.do({**said, **here})
            except BaseException as cause:
                if isinstance(cause, PeerError) or not isinstance(cause, LlmkitError):  # all ranks know of the others
                    self.lost = cause
                raise

    def _check(self) -> None:
        again = "load the model again"
        if not self.open:
            raise ModelError("the engine's other ranks have ended", fix=again, key="tensor")
        if isinstance(self.lost, PeerError):
            raise PeerError(problems=self.lost.problems)
        if self.lost is not None:
            what = f"the ranks are out of step since a call was left ({type(self.lost).__name__}: {self.lost})"
            raise PeerError(what, fix=again, key="tensor")
