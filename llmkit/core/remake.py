"""Activations that a backward pass makes again instead of keeping.

A tensor that is cheap to make from tensors that are kept anyway (a norm of the residual stream, the product inside of a
gated MLP) carries the way to make it. An operation that would keep such an input keeps the way and its sources instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor


@dataclass(frozen=True)
class Way:
    """`make(*sources)` gives the tensor again, to the bit, while it is at `version`."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]
    version: int = 0


def remakable(made: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """`made`, which carries the way to make it again from `sources`."""
    made._llmkit_way = Way(make, tuple(s.detach() for s in sources), made._version)  # type: ignore[attr-defined]
    return made


def carried(x: Tensor, same: Tensor) -> Tensor:
    """`same`, a view of all of `x`, with the way to make `x` again, if there is one."""
    if (known := getattr(x, "_llmkit_way", None)) is not None and known.version == x._version:
        remakable(same, known.make, *known.sources)
    return same


def way_to(x: Tensor) -> Way:
    """How an operation gets `x` in its backward pass: by making it again, or by keeping it."""
    known = cast("Way | None", getattr(x, "_llmkit_way", None))
    if known is None or known.version != x._version:  # somebody changed it in place: it is no longer what was made
        return Way(_itself, (x,))
    return known


def _itself(x: Tensor) -> Tensor:
    return x
