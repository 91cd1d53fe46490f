"""What `auto` comes to: rows of a forward and recompute, the largest and cheapest that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmkit.core.shape import Shape
from llmkit.plan.account import Account, Held, account
from llmkit.plan.shares import ALONE, Shares

FORWARD_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of one forward that keep a device busy: more of them cost memory and gain little."""
WIDE, MORE = 128_000_000, 4
"""Parameters of a layer of which so many tokens keep a GPU busy; narrower ones are done before its host has asked for
the next (benchmarks/LOG.md), and get up to so many times as many."""
HEADROOM = 0.85
FILLED = 4
"""Micro-batches a stage that `auto` leaves a pipeline, so that each is idle for less than a fifth of a step."""
RECOMPUTE = {0: "none", 2: "selective", 1: "full"}
"""Every so many layers make their activations again; cheapest first."""


@dataclass(frozen=True)
class Choice:
    """What `auto` came to."""

    rows: int
    recompute: int
    """Every so many layers; 0 for none."""
    account: Account
    fits: bool
    strategy: str = ""
    """What `parallel.strategy` came to."""


def enough(shape: Shape, device: str) -> int:
    """Tokens of one forward that keep the device busy."""
    if device == "cpu":
        return FORWARD_TOKENS[device]
    layer = max(1, (shape.params - shape.embedded) // shape.layers)
    return FORWARD_TOKENS[device] * min(MORE, max(1, WIDE // layer))


def choose(
    shape: Shape,
    held: Held,
    max_length: int,
    available: int,
    device: str,
    rows: int | None,
    recompute: int | None,
    most: int | None = None,
    shares: Shares = ALONE,
) -> Choice:
    """Rows per forward and recompute, each as asked or, where `None`, the largest and cheapest that fit; a step has
    `most` rows on a rank."""
    full = max(1, enough(shape, device) // max_length)
    if shares.pipeline > 1 and most:
        full = max(1, min(full, most // (FILLED * shares.pipeline)))
    wanted = rows or min(full, most or full)
    tries = [recompute] if recompute is not None else list(RECOMPUTE)

    def made(count: int, again: int) -> Choice:
        turns = -(-most // count) if most else 2
        whole = account(shape, replace(held, recompute=again, turns=turns), count * max_length, shares)
        return Choice(count, again, whole, whole.peak <= HEADROOM * available)

    for again in tries:
        for count in [wanted] if rows else range(wanted, 0, -1):
            choice = made(count, again)
            if choice.fits:
                return choice
    return made(rows or 1, tries[-1])
