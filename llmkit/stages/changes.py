"""What can be changed where a stage does not fit, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from llmkit.adapters.node import Lora
from llmkit.core.errors import LlmkitError
from llmkit.core.shape import Shape
from llmkit.models.node import Nf4
from llmkit.parallel.node import Fsdp
from llmkit.plan.devices import DEVICES
from llmkit.stages.planned import Planned, planned
from llmkit.stages.training import Training
from llmkit.train.optim import AdamW8bit

STANDIN = "h100-80gb"
"""Whose proportions of speed count where the device's own are not known."""


@dataclass(frozen=True)
class Change:
    """A change that fits."""

    keys: str
    """As overrides."""
    slower: float
    """Share of a step's time that it adds; below 0 it is faster."""
    also: str
    """What it changes beside the time, or nothing."""
    peak: int

    @property
    def cost(self) -> str:
        """In words."""
        time = f"{self.slower:+.0%} time a step" if abs(self.slower) >= 0.005 else "no time"
        return f"{time}; {self.also}" if self.also else time


@dataclass(frozen=True)
class _Move:
    keys: str
    fields: Mapping[str, Any]
    """Of the stage, anew."""
    also: str = ""
    times: int = 1
    """Ranks, in multiples of those that there are."""


def changes(node: Training, where: str, ranks: int, free: int, shape: Shape, count: int = 3) -> list[Change]:
    """The cheapest changes after which the stage fits: first those that leave the result as it is. Two moves together
    where no single one is enough."""
    moves = list(_moves(node, ranks))
    found = [made for move in moves if (made := _tried(move, node, where, ranks, free, shape)) is not None]
    if len(found) < count:
        pairs = (_both(a, b) for a, b in combinations(moves, 2))
        more = [_tried(pair, node, where, ranks, free, shape) for pair in pairs if pair is not None]
        found += [change for change in more if change is not None and not _within(change, found)]
    return sorted(found, key=lambda change: (bool(change.also), change.slower))[:count]


def _within(change: Change, found: list[Change]) -> bool:
    """Whether half of a pair is enough."""
    return any(set(one.keys.split()) <= set(change.keys.split()) for one in found)


def _moves(node: Training, ranks: int) -> Iterator[_Move]:
    again, parallel = node.memory.recompute, node.parallel
    if node.micro_batch != 1 and not node.memory.optimizer_in_backward:
        yield _Move("micro_batch=1", {"micro_batch": 1})
    for wanted in ("selective", "full"):
        if again not in (wanted, "full", "auto"):
            yield _Move(f"memory.recompute={wanted}", {"memory": replace(node.memory, recompute=wanted)})
    kind = parallel.resolve(ranks).kind
    if ranks > 1 and kind == "ddp":
        yield _Move("parallel.strategy=fsdp", {"parallel": replace(parallel, strategy=Fsdp(), replicate="auto")})
    if kind == "fsdp":
        away = {"parallel": replace(parallel, strategy=Fsdp(offload="cpu"))}
        yield _Move("parallel.strategy={kind: fsdp, offload: cpu}", away, "needs the host's memory")
        yield _Move(f"ranks={2 * ranks}", {}, "twice the devices", 2)
    for keys, fields, also in node.moves():
        yield _Move(keys, fields, also)
    if node.optim.kind == "adamw":
        yield _Move("optim.kind=adamw_8bit", {"optim": AdamW8bit(lr=node.optim.lr)}, "moments of 8 bits")
    if node.adapter.frozen_base and node.quant.kind == "none":
        yield _Move("quant.kind=bnb_nf4", {"quant": Nf4()}, "a base of 4 bits")
    if not node.adapter.frozen_base:
        yield _Move("adapter.kind=lora", {"adapter": Lora()}, "a low-rank update alone is trained")
    half = node.data.max_length // 2
    yield _Move(f"data.max_length={half}", {"data": replace(node.data, max_length=half)}, "shorter rows")


def _both(a: _Move, b: _Move) -> _Move | None:
    """Two moves as one, where they touch different keys."""
    if set(a.fields) & set(b.fields):
        return None
    also = ", ".join(filter(None, (a.also, b.also)))
    return _Move(f"{a.keys} {b.keys}", {**a.fields, **b.fields}, also, a.times * b.times)


def _tried(move: _Move, node: Training, where: str, ranks: int, free: int, shape: Shape) -> Change | None:
    try:
        other = replace(node, **move.fields)
        made = planned(other, where, ranks * move.times, free, shape)
    except LlmkitError:  # it contradicts another key, or its degrees do not go with the ranks
        return None
    if not made.fits:
        return None
    seconds, before = (_seconds(each, ranks * n, shape, made) for each, n in ((other, move.times), (node, 1)))
    return Change(move.keys, seconds / before - 1, move.also, made.choice.account.peak)


def _seconds(node: Training, ranks: int, shape: Shape, like: Planned) -> float:
    """Of a token; all ranks are on one host, where the device stands in for this machine's."""
    known = like.where in DEVICES
    made = planned(node, like.where if known else STANDIN, ranks, shape=shape, here=0 if known else ranks)
    return made.times.seconds / made.times.tokens if made.times is not None else 1.0
