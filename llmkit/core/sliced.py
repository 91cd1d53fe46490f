"""A part of a tensor that lies on several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """This rank's block of a tensor of `shape`: `tensor` begins at `start`, one number a dimension. Blocks of all ranks
    cover the whole; the same block may lie on several ranks, and one of them may be empty."""

    tensor: Tensor
    shape: tuple[int, ...]
    start: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        """Where it ends, in each dimension."""
        return tuple(a + n for a, n in zip(self.start, self.tensor.shape, strict=True))


def whole(tensor: Tensor | Slice) -> Slice:
    """A tensor that this rank holds whole, as a slice."""
    if isinstance(tensor, Slice):
        return tensor
    return Slice(tensor, tuple(tensor.shape), (0,) * tensor.dim())


State = Mapping[str, "Tensor | Slice"]
"""Named tensors, whole or this rank's part of each: what a checkpoint is made of."""
