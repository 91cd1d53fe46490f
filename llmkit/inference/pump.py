"""Events for those who wait in an event loop: one thread computes steps while there is one of them, and ends then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from llmkit.core.errors import LlmkitError
from llmkit.inference.request import Ask, Event, alone
from llmkit.inference.turns import Turns


@dataclass(eq=False)
class Listener:
    """One who waits; `said` holds events, or what went wrong."""

    ask: Ask
    loop: asyncio.AbstractEventLoop
    said: asyncio.Queue[Event | BaseException] = field(default_factory=asyncio.Queue)
    id: str = ""
    """Of its request, once the engine has it."""

    def tell(self, what: Event | BaseException) -> None:
        """From the engine's thread; who listens in a loop that has been closed is told nothing."""
        with suppress(RuntimeError):  # it may be closed at any moment
            self.loop.call_soon_threadsafe(self.said.put_nowait, what)


class Pump:
    """The engine's thread. An event loop never waits for it: what is asked and who leaves is told it in lists."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.lock, self.alive = turns, threading.Lock(), False
        self.coming: list[Listener] = []
        self.gone: list[Listener] = []
        self.listening: list[Listener] = []
        self.pool = ThreadPoolExecutor(1, "llmkit-engine")

    async def events(self, ask: Ask) -> AsyncGenerator[Event]:
        """The events of an ask, as they come. Who closes it, or is cancelled, frees what the ask held.

        Raises:
            RequestError: it can never be answered.
        """
        if self.turns.engine.long(ask.sampling, ask.adapter):
            await asyncio.to_thread(self.turns.engine.prepare, ask.sampling, ask.adapter)
        one = Listener(ask, asyncio.get_running_loop())
        self._put(self.coming, one)
        try:
            while True:
                said = await one.said.get()
                if isinstance(said, BaseException):
                    raise said
                yield said
        finally:
            self._put(self.gone, one)

    def close(self) -> None:
        """After the last step; no more is asked."""
        self.pool.shutdown()

    def _put(self, where: list[Listener], one: Listener) -> None:
        with self.lock:
            where.append(one)
            if not self.alive:
                self.alive = True
                self.pool.submit(self._run).add_done_callback(self._ended)

    def _run(self) -> None:
        while self._asked():
            if self.listening:
                self.turns.step()
                live = self.turns.engine.live
                self.listening = [one for one in self.listening if one.id in live and not one.loop.is_closed()]

    def _asked(self) -> bool:
        """Lets come and go; whether anything is left to do."""
        with self.lock:
            coming, gone = list(self.coming), list(self.gone)
            self.coming.clear()
            self.gone.clear()
        for one in coming:
            self._begin(one)
        for one in gone:
            self.turns.drop(one.id)
            self.listening = [other for other in self.listening if other is not one]
        with self.lock:
            self.alive = bool(self.listening or self.coming or self.gone)
            return self.alive

    def _begin(self, one: Listener) -> None:
        try:
            with alone("it cannot be taken on"):
                one.id = self.turns.add(one.ask, one.tell).id
            self.listening.append(one)
        except LlmkitError as refused:
            one.tell(refused)

    def _ended(self, done: Future[None]) -> None:
        """What a step failed of, everybody is told."""
        if (cause := done.exception()) is not None:
            with self.lock:
                told, self.alive = [*self.listening, *self.coming], False
                self.listening, self.coming, self.gone = [], [], []
            for one in told:
                one.tell(cause)
                self.turns.drop(one.id)
