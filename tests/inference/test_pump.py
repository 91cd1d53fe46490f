"""The engine's thread and those who wait for it, over an engine of a few lines."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from llmkit.inference.pump import Listener, Pump
from llmkit.inference.request import Ask, Event, Prompt, Request
from llmkit.inference.sampling import Sampling


class Turns:
    """Answers each ask in one step; one of no tokens fails as nothing foreseen does."""

    def __init__(self) -> None:
        self.engine: Any = SimpleNamespace(live={}, long=lambda *_: False)

    def add(self, ask: Ask, sink: Any) -> Request:
        if not ask.prompt.ids:
            raise OSError("its adapter lies on a disk that is gone")
        made = Request(f"r{len(self.engine.live)}", ask.prompt.ids, ask.sampling)
        self.engine.live[made.id] = sink
        return made

    def step(self) -> None:
        for id, sink in list(self.engine.live.items()):
            sink(Event(id, 0, (), "stop"))
            del self.engine.live[id]

    def drop(self, id: str) -> None:
        self.engine.live.pop(id, None)


def test_one_that_cannot_be_taken_on_is_told_so_and_those_that_come_with_it_are_answered() -> None:
    pump = Pump(Turns())  # type: ignore[arg-type]

    async def asked(*ids: int) -> str:
        async for event in pump.events(Ask(Prompt(ids), Sampling())):
            return str(event.finish)
        return ""

    async def all_of() -> list[Any]:
        pump.alive = True  # so that no thread looks before all of them are there
        coming = [asyncio.ensure_future(asked(*ids)) for ids in ((1,), (), (2,))]
        while len(pump.coming) < len(coming):
            await asyncio.sleep(0)
        pump.pool.submit(pump._run).add_done_callback(pump._ended)
        return await asyncio.wait_for(asyncio.gather(*coming, return_exceptions=True), 5)

    first, second, third = asyncio.run(all_of())
    assert (first, third) == ("stop", "stop") and "disk that is gone" in str(second)
    pump.close()


def test_who_listens_in_a_loop_that_is_closed_keeps_nobody_else_from_hearing() -> None:
    loop = asyncio.new_event_loop()
    one = Listener(Ask(Prompt((1,))), loop)
    loop.close()
    one.tell(Event("a", 0, (), "stop"))
