"""How many ranks there are of each kind, and where this one stands among them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llmkit.core.errors import RecipeError

AXES = ("pipeline", "replicate", "shard", "expert", "context", "tensor")
"""From the slowest to the fastest: ranks that are next to each other share what is costliest to move."""


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis; their product is the world."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """In the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world(self) -> int:
        """All ranks."""
        return prod(self.shape)

    @property
    def data(self) -> int:
        """Ranks that see different rows."""
        return self.replicate * self.shard * self.expert

    def place(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        found = {}
        for axis, size in zip(reversed(AXES), reversed(self.shape), strict=True):
            rank, found[axis] = divmod(rank, size)
        return found

    def data_index(self, rank: int) -> int:
        """Which share of the rows a rank sees."""
        place = self.place(rank)
        return (place["replicate"] * self.shard + place["shard"]) * self.expert + place["expert"]


@dataclass(frozen=True)
class Deal:
    """Which of `count` equal shares of a step's micro-batches a rank computes, in this order."""

    shares: tuple[int, ...]
    count: int


def deal(degrees: Degrees, rank: int, virtual: int = 0) -> Deal:
    """A share for each rank that sees other rows; with `virtual` shards, as many neighbouring ones for each of them."""
    index = degrees.data_index(rank)
    if not virtual:
        return Deal((index,), degrees.data)
    each = virtual // degrees.data
    return Deal(tuple(range(index * each, (index + 1) * each)), virtual)


def check_virtual(degrees: Degrees, virtual: int) -> None:
    """Sees to it that `virtual` shards can be dealt out evenly, in halves of halves.

    Raises:
        RecipeError: they cannot; it names the numbers of ranks that fit.
    """
    if virtual & (virtual - 1):
        fix = f"use a power of two, such as {1 << virtual.bit_length()}"
        raise RecipeError(f"{virtual} is no power of two", fix=fix, key="parallel.virtual")
    if virtual % degrees.data:
        fit = [1 << bit for bit in range(virtual.bit_length())]
        raise RecipeError(
            f"{degrees.data} ranks do not divide the {virtual} virtual shards of a deterministic run",
            fix=f"use {', '.join(map(str, fit))} ranks, raise parallel.virtual, or set deterministic=false",
            key="parallel.virtual",
        )


def degrees(
    world: int,
    strategy: str,
    replicate: int | None = None,
    shard: int | None = None,
    context: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
) -> Degrees:
    """The degrees of a run of `world` ranks; None is what is left.

    Raises:
        RecipeError: they do not divide the ranks, or the strategy has no use for one of them.
    """
    inner = context * tensor * pipeline * expert
    said_of = _said(context, tensor, pipeline, expert)
    if strategy == "zero":
        _check_zero((*said_of, ("replicate", replicate or 1)))
    if world % inner:
        said = ", ".join(f"{n} {d}" for n, d in said_of if d > 1)
        more = inner * max(1, world // inner)
        raise RecipeError(
            f"{said} takes ranks in groups of {inner}, and there are {world}",
            fix=f"use {more} ranks, or degrees whose product divides {world}: {_divisors(world)}",
            key=f"parallel.{next(n for n, d in said_of if d > 1)}",
        )
    left = world // inner
    if strategy == "single" and left > 1:
        raise RecipeError(
            f"single is one replica, and there are ranks for {left}",
            fix=f"set parallel.strategy=auto, ddp, fsdp or zero, or run {inner} rank{'s' if inner > 1 else ''}",
            key="parallel.strategy",
        )
    if strategy in ("ddp", "single"):
        if (shard or 1) > 1:
            raise RecipeError(
                f"{strategy} shards nothing, and shard is {shard}",
                fix="set parallel.strategy=fsdp, or drop parallel.shard",
                key="parallel.shard",
            )
        replicate, shard = replicate or left, 1
    elif shard is None:
        copies = replicate or 1
        shard = max(1, left // copies)
        replicate = copies
    else:
        replicate = replicate or max(1, left // shard)
    if replicate * shard != left:
        raise RecipeError(
            f"replicate {replicate} x shard {shard} is {replicate * shard}, and there are {left} ranks for them",
            fix=f"use numbers whose product is {left}: {_divisors(left)}",
            key="parallel.replicate" if replicate > 1 else "parallel.shard",
        )
    return Degrees(pipeline, replicate, shard, context, tensor, expert)


def _check_zero(said: tuple[tuple[str, int], ...]) -> None:
    """DeepSpeed's ranks share one model among all of them."""
    for name, degree in said:
        if degree > 1:
            what = f"zero shares one model among all ranks, and {name} is {degree}"
            raise RecipeError(what, fix=f"set parallel.{name}=1, or parallel.strategy=fsdp", key=f"parallel.{name}")


def _said(context: int, tensor: int, pipeline: int, expert: int) -> tuple[tuple[str, int], ...]:
    return (("tensor", tensor), ("context", context), ("pipeline", pipeline), ("expert", expert))


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
