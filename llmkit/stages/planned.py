"""What a training stage needs and how long it takes, on this machine or another, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from llmkit.adapters.limits import virtual_tokens
from llmkit.core.ranks import Ranks
from llmkit.core.shape import Shape
from llmkit.models.outline import config_of, outline, stored
from llmkit.parallel.degrees import Degrees
from llmkit.plan.account import account
from llmkit.plan.choice import HEADROOM, RECOMPUTE, Choice
from llmkit.plan.devices import DEVICES
from llmkit.plan.shares import shares
from llmkit.plan.times import Times
from llmkit.stages.apart_account import drawing_parts
from llmkit.stages.degrees import check_degrees
from llmkit.stages.holding import held_by
from llmkit.stages.sizes import chosen, strategies, whole_model
from llmkit.stages.timed import step_times
from llmkit.stages.training import Training

GIB = 2**30
MOST = 1 << 14
"""Rows of a micro-batch that nobody asks for."""


@dataclass(frozen=True)
class Planned:
    """A plan of one stage."""

    where: str
    """The device."""
    ranks: int
    degrees: Degrees
    free: int
    """Bytes that each rank has."""
    choice: Choice
    turns: int
    """Micro-batches of a step, on a rank."""
    largest: int
    """Rows of the largest micro-batch that fits; 0 where none does."""
    times: Times | None
    """Where the device's speed is known."""
    drawing: Mapping[str, int] = field(default_factory=dict)
    """Bytes of a rank that only draws, by part, where there are such."""
    aside: int = 0
    """How many of those there are."""

    @property
    def fits(self) -> bool:
        """Whether each rank has room for what it does."""
        return self.choice.fits and sum(self.drawing.values()) <= HEADROOM * self.free

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes at most: while the model is read, of a step, of saving and of going on."""
        made = self.choice.account
        rollout = {"rollout": made.rollout} if made.rollout else {}
        return {"load": made.load, "step": made.total, **rollout, "save": made.save, "resume": made.resume}

    def values(self) -> dict[str, Any]:
        """For JSON: bytes and seconds."""
        made = self.choice
        found: dict[str, Any] = {
            "device": self.where,
            "ranks": self.ranks,
            "degrees": {k: v for k, v in asdict(self.degrees).items() if v > 1},
            "strategy": made.strategy,
            "micro_batch": made.rows,
            "micro_batches": self.turns,
            "recompute": RECOMPUTE[made.recompute],
            "fits": self.fits,
            "available": self.free,
            "usable": int(HEADROOM * self.free),
            "parts": made.account.parts,
            "peaks": self.peaks,
            "largest_micro_batch": self.largest,
        }
        if self.aside:
            found |= {"drawing_ranks": self.aside, "drawing_parts": dict(self.drawing)}
        if self.times is not None:
            found |= {"step_seconds": self.times.seconds, "tokens_per_second": self.times.rate, "mfu": self.times.mfu}
            found["sent_bytes"] = self.times.sent
            found |= self._drawn(self.times)
        return found

    def _drawn(self, spent: Times) -> dict[str, Any]:
        """Of what is drawn before a step, for JSON."""
        if not spent.rollout:
            return {}
        found = {"rollout_seconds": spent.rollout, "scoring_seconds": spent.scoring, "answers": spent.answers}
        return found | {"answers_per_second": spent.answers / spent.seconds, "rollout_share": spent.share}

    def lines(self) -> Iterator[str]:
        """For people."""
        made = self.choice
        degrees = ", ".join(f"{k} {v}" for k, v in asdict(self.degrees).items() if v > 1)
        where = f"{self.ranks} x {self.where}" if self.ranks > 1 else self.where
        apart = f", {self.ranks - self.aside} train and {self.aside} only draw" if self.aside else ""
        yield f"{where}: {made.strategy}{f' ({degrees})' if degrees else ''}{apart}"
        again = f", {RECOMPUTE[made.recompute]} recompute" if made.recompute else ""
        yield f"micro-batch {made.rows} x {self.turns} a step on each rank{again}"
        parts = _parts(made.account.parts)
        verdict = "fits" if made.fits else "does not fit"
        peak = f"{made.account.peak / GIB:.2f} of {self.free / GIB:.2f} GiB"
        yield f"memory of a rank: {peak}, {verdict} ({HEADROOM:.0%} is used at most)"
        yield f"  {parts}"
        yield "  peaks: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.peaks.items())
        if self.choice.account.load > HEADROOM * self.free:
            yield "  what each rank holds while the model is read does not fit on its device"
        if self.aside:
            need = sum(self.drawing.values())
            verdict = "fits" if need <= HEADROOM * self.free else "does not fit"
            yield f"memory of a rank that only draws: {need / GIB:.2f} of {self.free / GIB:.2f} GiB, {verdict}"
            yield f"  {_parts(self.drawing)}"
        yield f"largest micro-batch that fits: {self.largest}" if self.largest else "no micro-batch fits"
        if self.times is not None:
            yield from _told(self.times)


def _parts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)


def _told(spent: Times) -> Iterator[str]:
    before = f"rollout {spent.rollout:.2f}, scoring {spent.scoring:.2f}, " if spent.rollout else ""
    yield (
        f"step {spent.seconds:.2f} s ({before}compute {spent.compute:.2f}, waiting {spent.waiting:.2f}, update "
        f"{spent.update:.2f}), {spent.rate:,.0f} tokens/s, MFU {spent.mfu:.0%}, "
        f"{spent.sent / GIB:.2f} GiB sent a rank"
    )
    if spent.rollout:
        rate = spent.answers / spent.seconds
        yield f"{spent.answers} answers a step, {rate:.1f} a second; {spent.share:.0%} of the time they are drawn"


def shape_of(node: Training) -> Shape:
    """The shape of a stage's model; of public ones that are in the table nothing is fetched.

    Raises:
        ModelError: there is no such model.
    """
    return outline(node.model) or stored(whole_model(node.model).folder)


def planned(
    node: Training, where: str, ranks: int, free: int = 0, shape: Shape | None = None, here: int = 0
) -> Planned:
    """A plan for each of `ranks` ranks on a device by name, or on `cpu` or `cuda` with `free` bytes for each; those
    that only draw are some of them. At 0, as many are `here`, on a host, as the device's data sheet says, or all.

    Raises:
        RecipeError: the recipe does not go with so many ranks on such hosts, or its degrees with the model.
        ModelError: the model cannot be had.
    """
    if (config := config_of(node.model)) is not None:
        check_degrees(config, node.parallel)
    device = DEVICES.get(where)
    kind, free = ("cuda", device.memory) if device is not None else (where, free)
    node.check_ranks(Ranks(0, ranks, 0, min(ranks, here or (ranks if device is None else device.here))))
    shape, train = shape or shape_of(node), ranks - node.aside
    choice = chosen(node, shape, kind, free, train)
    made = next(each for each in strategies(node, train) if each.parallel.resolve(train).kind == choice.strategy)
    degrees = made.parallel.degrees(train)
    turns = ceil(node.step_examples / degrees.data / choice.rows)
    largest = _largest(made, shape, kind, free, train, choice)
    spent = None if device is None else step_times(made, shape, device, train, choice, turns)
    apart = drawing_parts(node, shape, kind)
    return Planned(where, ranks, degrees, free, choice, turns, largest, spent, apart, node.aside)


def _largest(node: Training, shape: Shape, kind: str, free: int, ranks: int, choice: Choice) -> int:
    cut = shares(node.parallel.resolve(ranks), node.parallel.degrees(ranks))
    held = replace(held_by(node, shape, kind, ranks, free), recompute=choice.recompute, turns=max(2, cut.pipeline))
    length = node.row_tokens + virtual_tokens(node.adapter)

    def fits(rows: int) -> bool:
        return account(shape, held, rows * length, cut).peak <= HEADROOM * free

    low, high = 0, MOST
    while low < high:  # fits(low) holds, or low is 0
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
