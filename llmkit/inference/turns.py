"""An engine that several ask: whoever waits computes the next step, for all of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any

from llmkit.inference.engine import Engine
from llmkit.inference.request import Ask, Event, Request
from llmkit.inference.update import Update

Sink = Callable[[Event], None]


class Turns:
    """Deals an engine's events to those who asked. Calls may come from any thread; there is none of its own."""

    def __init__(self, engine: Engine, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """`around` is entered for each step, in whatever thread it is computed."""
        self.engine, self.around = engine, around
        self.lock = threading.Lock()
        self.sinks: dict[str, Sink] = {}
        self.boxes: dict[str, deque[Event]] = {}
        """Of those who come for their events (`next`)."""
        self.names = count()

    def add(self, ask: Ask, sink: Sink | None = None) -> Request:
        """Takes an ask on; its events go to `sink`, or wait to be called for by its name. Its grammar is compiled
        first, while others' steps go on.

        Raises:
            RequestError: it can never be answered.
        """
        self.engine.prepare(ask.sampling, ask.adapter)
        box = deque[Event]()
        with self.lock:
            name = f"turn-{next(self.names)}"
            made = Request(
                name,
                ask.prompt.ids,
                ask.sampling,
                ask.adapter,
                processors=ask.processors,
                prediction=ask.prediction,
            )
            self.engine.add(made)
            self.boxes[made.id], self.sinks[made.id] = box, sink or box.append
        return made

    def next(self, id: str) -> Event:
        """The next event of a request; computes steps until there is one."""
        box = self.boxes[id]
        while True:
            with self.lock:
                if box:
                    return box.popleft()
                self._step()

    def step(self) -> None:
        """Computes one step."""
        with self.lock:
            self._step()

    def update(self, work: Callable[[], None], drain: bool = True) -> Update:
        """Changes the weights (`Engine.update`); computes the steps that it waits for, and what they make is dealt."""
        with self.lock:
            update = self.engine.update(work, drain)
        while not update.done:
            self.step()
        return update

    def drop(self, id: str) -> None:
        """Nobody asks for this one any longer: what it held in the engine is free."""
        with self.lock:
            self.boxes.pop(id, None)
            if self.sinks.pop(id, None) is not None:
                self.engine.abort(id)

    def _step(self) -> None:
        with self.around():
            events = self.engine.step()
        for event in events:
            if event.request in self.sinks:
                self.sinks[event.request](event)
