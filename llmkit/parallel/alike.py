"""Whether ranks that hold copies of the same thing still hold the same: memory and links corrupt values in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmkit.core.errors import PeerError
from llmkit.core.peers import Peers
from llmkit.core.sliced import Slice
from llmkit.parallel.judge import AGAIN

WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value -> integers of as many."""


def compare(peers: Peers, held: Mapping[str, Tensor | Slice], step: int) -> None:
    """Sees to it that all ranks that hold the same part of a tensor hold the same bits.

    Raises:
        PeerError: some do not; it names the rank that differs from most, and a tensor.
    """
    said = peers.gather([peers.ranks.name, marks(held)])
    if (found := odd([own for _, own in said])) is None:
        return
    ranks, others, key = found
    who, whom = (" and ".join(said[rank][0] for rank in some) for some in (ranks, others[:1]))
    raise PeerError(f"after step {step} {who} holds other values than {whom} in {key}", fix=AGAIN)


def marks(held: Mapping[str, Tensor | Slice]) -> dict[str, int]:
    """A number for the bits of each tensor, by its name and, of a part, its place."""
    return {_key(name, value): _mark(value) for name, value in held.items()}


def odd(said: Sequence[Mapping[str, int]]) -> tuple[list[int], list[int], str] | None:
    """Of marks by key, a rank each: ranks that differ from most that have the key, the others, and the key."""
    for key in dict.fromkeys(key for own in said for key in own):
        holders = {rank: own[key] for rank, own in enumerate(said) if key in own}
        most = Counter(holders.values()).most_common(1)[0][0]
        if differs := [rank for rank, mark in holders.items() if mark != most]:
            return differs, [rank for rank in holders if rank not in differs], key
    return None


def _key(name: str, value: Tensor | Slice) -> str:
    if not isinstance(value, Slice):
        return name
    return f"{name}, {list(value.tensor.shape)} from {list(value.start)}"


def _mark(value: Tensor | Slice) -> int:
    """The sum of a tensor's bits, read as integers."""
    tensor = (value.tensor if isinstance(value, Slice) else value).detach().contiguous()
    return int(tensor.view(-1).view(WHOLE[tensor.element_size()]).sum(dtype=torch.int64))
