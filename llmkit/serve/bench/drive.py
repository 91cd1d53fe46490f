"""Carries a load out. The clock is asyncio's own, so a loop with a time of its own makes the whole of it repeatable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llmkit.serve.bench.load import Asked, Load
from llmkit.serve.bench.shot import Send, Shot, shoot

TICK = 0.01
"""Seconds between looks at how late the client's own loop is."""


@dataclass(frozen=True)
class Driven:
    """What came of a load."""

    shots: tuple[Shot, ...]
    """In the order in which they were due; the turns of a conversation one after the other."""
    lags: tuple[float, ...]
    """How late the client's loop woke, each time it was looked at: what it measures may be late by so much."""


async def drive(load: Load, asked: Iterator[Asked], send: Send, on_done: Callable[[int], None] | None = None) -> Driven:
    """Sends all of it, and waits for the answers."""
    loop = asyncio.get_running_loop()
    start, done, lags = loop.time(), 0, list[float]()

    def clock() -> float:
        return loop.time() - start

    async def one(number: int, due: float) -> list[Shot]:
        """All turns of one that is asked: the next as soon as there is an answer."""
        nonlocal done
        made, turn = list[Shot](), next(asked, None)
        while turn is not None:
            said = list[str]()
            made.append(await shoot(Shot(number, due, clock()), turn, send, clock, load.timeout, said))
            turn, due = turn.after("".join(said)) if made[-1].good else None, clock()
        done += 1
        if on_done is not None:
            on_done(done)
        return made

    watching = asyncio.create_task(_watch(clock, lags))
    try:
        shots = await (_closed(load, one, clock) if load.concurrency else _opened(load, one, clock))
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    return Driven(tuple(sorted(chain(*shots), key=lambda shot: shot.number)), tuple(lags))


async def _opened(
    load: Load, one: Callable[[int, float], Coroutine[Any, Any, list[Shot]]], clock: Callable[[], float]
) -> list[list[Shot]]:
    """Each when it is due, whatever became of those before."""
    tasks = []
    for number, due in enumerate(load.arrivals()):
        while (left := due - clock()) > 0:
            await asyncio.sleep(left)
        tasks.append(asyncio.ensure_future(one(number, due)))
        await asyncio.sleep(0)
    return list(await asyncio.gather(*tasks))


async def _closed(
    load: Load, one: Callable[[int, float], Coroutine[Any, Any, list[Shot]]], clock: Callable[[], float]
) -> list[list[Shot]]:
    """So many at a time."""
    numbers, shots = iter(range(load.all)), list[list[Shot]]()

    async def lane() -> None:
        for number in numbers:
            shots.append(await one(number, clock()))

    await asyncio.gather(*(lane() for _ in range(load.concurrency)))
    return shots


async def _watch(clock: Callable[[], float], lags: list[float]) -> None:
    while True:
        before = clock()
        await asyncio.sleep(TICK)
        lags.append(max(0.0, clock() - before - TICK))
