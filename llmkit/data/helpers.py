"""The chunks of a source in their order, made by this process and by helpers beside it.

Helpers are forks that are given rows and give back chunks, as `chunk` makes them, over a pipe; the first chunks are
made here, so that all that a helper uses is loaded. One that dies or hangs is an error that names it and its rows; no
row is left out. What a helper cannot be sent or cannot make is made here: errors are raised where they are told.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

from llmkit.core.errors import RecipeError, ResourceError
from llmkit.data.chunk import ROWS, Chunk, Law, chunk
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Raw, place_of
from llmkit.data.wire import Late, Pipe, packed_chunk, packed_rows, read_chunk, read_rows

ALONE = 8
"""Chunks that are made here before helpers begin."""
DEADLINE = 300.0
"""Seconds that a helper may take for a chunk."""
MOST = 8
"""Helpers, at most."""
ENVIRONMENT = "LLMKIT_HELPERS"
Rows = Sequence[Raw | BadRow]


def chunks(rows: Iterable[Raw | BadRow], law: Law, renderer: Renderer) -> Iterator[Chunk]:
    """All examples of `rows`, some hundred rows at a time.

    Raises:
        DataError: a row cannot be read and is not to be set aside.
        ResourceError: a helper died, or does not answer.
    """
    found, base = iter(rows), 0
    for _ in range(ALONE):
        if not (here := list(islice(found, ROWS))):
            return
        yield chunk(here, base, law, renderer)
        base += len(here)
    if not (here := list(islice(found, ROWS))):
        return
    team = Team(count(), law, renderer)
    try:
        yield from team.made(here, found, base)
    finally:
        team.end()


def count() -> int:
    """How many helpers there may be: one for each core but this process's own.

    Raises:
        RecipeError: the environment says what is no number.
    """
    said = os.environ.get(ENVIRONMENT, "").strip()
    if said and not said.isdecimal():
        raise RecipeError(f"{said!r} is no number", fix="write how many helpers there may be", key=ENVIRONMENT)
    return min(MOST, int(said)) if said else min(MOST, len(os.sched_getaffinity(0)) - 1)


class Work:
    """A chunk that a helper is to make; what goes wrong is kept, and raised where the chunk is asked for."""

    def __init__(self, rows: Rows, base: int) -> None:
        self.rows, self.base = rows, base
        self.made: Chunk | None = None
        self.failed: BaseException | None = None
        self.done = Queue[None](1)

    def __enter__(self) -> None:
        """Begins."""

    def __exit__(self, kind: Any, cause: BaseException | None, trace: Any) -> bool:
        self.failed = cause
        self.done.put(None)
        return True


class Helper:
    """One fork, and the thread here that talks to it."""

    def __init__(self, number: int, law: Law, renderer: Renderer, todo: Queue[Work | None], others: list[Pipe]) -> None:
        self.number, self.todo = number, todo
        self.pipe, theirs = Pipe.pair()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(theirs, [self.pipe, *others], law, renderer)
        theirs.close()
        self.thread = Thread(target=self._talk, daemon=True, name=f"helper {number}")

    def _talk(self) -> None:
        while (work := self.todo.get()) is not None:
            with work:
                work.made = self._asked(work)
            if work.failed is not None:
                return

    def _asked(self, work: Work) -> Chunk | None:
        try:
            said = packed_rows(work.rows, work.base)
        except ValueError:
            return None  # a value of a kind of its own, as tables have them
        try:
            self.pipe.send(said, DEADLINE)
            answer = self.pipe.receive(DEADLINE)
        except Late as cause:
            os.kill(self.pid, signal.SIGKILL)
            raise self._lost(f"has not answered for {DEADLINE:.0f} s", work) from cause
        except (EOFError, OSError) as cause:
            raise self._lost("died", work) from cause
        return read_chunk(answer)

    def _lost(self, what: str, work: Work) -> ResourceError:
        first, last = (place_of(row) for row in (work.rows[0], work.rows[-1]))
        return ResourceError(
            f"helper {self.number} (pid {self.pid}) {what}; it had the rows {first} to {last}",
            fix=f"look for what ends processes (memory?), or set {ENVIRONMENT}=0",
            key=ENVIRONMENT,
        )

    def end(self) -> None:
        """Takes it away."""
        os.kill(self.pid, signal.SIGKILL)  # it holds nothing that would be lost, and is not reaped yet
        os.waitpid(self.pid, 0)
        if self.thread.ident is not None:
            self.thread.join()  # which sees its end
        self.pipe.close()


class Team:
    """Helpers that share the chunks with this process."""

    def __init__(self, many: int, law: Law, renderer: Renderer) -> None:
        self.law, self.renderer = law, renderer
        self.todo = Queue[Work | None](max(1, 2 * many))
        self.helpers: list[Helper] = []
        for number in range(many):  # all forks come before the first thread
            pipes = [helper.pipe for helper in self.helpers]
            try:
                self.helpers.append(Helper(number + 1, law, renderer, self.todo, pipes))
            except OSError as cause:
                self.end()
                what = f"helper {number + 1} cannot be started: {os.strerror(cause.errno or 0)}"
                fix = f"end other processes, or set {ENVIRONMENT}={number}"
                raise ResourceError(what, fix=fix, key=ENVIRONMENT) from cause
        for helper in self.helpers:
            helper.thread.start()

    def made(self, first: Rows, rest: Iterator[Raw | BadRow], base: int) -> Iterator[Chunk]:
        """The chunks in their order."""
        waiting: deque[Work] = deque()
        here = first
        while here:
            waiting.append(self._given(Work(here, base)))
            base += len(here)
            while waiting and (not waiting[0].done.empty() or len(waiting) > 4 * self.todo.maxsize):
                yield self._result(waiting.popleft())
            here = list(islice(rest, ROWS))
        while waiting:
            yield self._result(waiting.popleft())

    def _given(self, work: Work) -> Work:
        try:
            if not self.helpers:
                raise Full
            self.todo.put_nowait(work)
        except Full:  # all are busy: this process makes it
            work.made = chunk(work.rows, work.base, self.law, self.renderer)
            work.done.put(None)
        return work

    def _result(self, work: Work) -> Chunk:
        while True:
            try:
                work.done.get(timeout=1.0)
                break
            except Empty:
                if not any(helper.thread.is_alive() for helper in self.helpers) and work.done.empty():
                    break  # the one that failed had not taken it: its failure is told in its turn
        if work.failed is not None:
            raise work.failed
        return work.made if work.made is not None else chunk(work.rows, work.base, self.law, self.renderer)

    def end(self) -> None:
        """Takes all helpers away."""
        while not self.todo.empty():
            try:
                self.todo.get_nowait()
            except Empty:
                break
        for _ in self.helpers:
            self.todo.put(None)
        for helper in self.helpers:
            helper.end()


def _serve(pipe: Pipe, others: Sequence[Pipe], law: Law, renderer: Renderer) -> None:
    """What a helper does until its pipe is closed; never returns."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all: this process's parent answers
            signal.signal(number, signal.SIG_IGN)
        for other in others:  # so that a parent that dies is seen
            other.close()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        while True:
            pipe.send(_answer(pipe.receive(None), law, renderer), None)
    finally:
        os._exit(0)


def _answer(said: bytes, law: Law, renderer: Renderer) -> bytes:
    rows, base = read_rows(said)
    try:
        return packed_chunk(chunk(rows, base, law, renderer))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return b""
