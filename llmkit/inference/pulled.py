"""Text that is pushed, pulled: for those who go on with each piece as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue


class Left(Exception):
    """Nobody pulls any longer."""


def pulled(work: Callable[[Callable[[str], None]], None]) -> Iterator[str]:
    """What `work` says, piece by piece, while it runs in a thread; what it fails of is raised. Who leaves early ends it
    at its next piece."""
    pieces, gone = SimpleQueue[str | Future[None]](), list[bool]()

    def say(text: str) -> None:
        if gone:
            raise Left
        pieces.put(text)

    with ThreadPoolExecutor(1, "llmkit-text") as pool:
        made = pool.submit(work, say)
        made.add_done_callback(pieces.put)
        try:
            while isinstance(piece := pieces.get(), str):
                yield piece
            made.result()
        finally:
            gone.append(True)
