"""What a run tells its user, on standard error: a bar on a terminal, else plain lines; a closed stream is no fault."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Console:
    """Notices and progress. `quiet` shows notices only; `mute` leaves them to the log."""

    def __init__(self, quiet: bool = False, every: float = 10.0, mute: bool = False) -> None:
        self.quiet, self.every, self.mute = quiet or mute, every, mute
        self.terminal = not self.quiet and sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._said = 0.0

    def notice(self, text: str) -> None:
        """One line, on the screen and in the run's log."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._write(f"llmkit: {text}")
        logging.getLogger("llmkit").info("%s", text)

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begins a progress of `total` steps."""
        self.end()
        if not self.terminal:
            self._said = 0.0
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, TextColumn("{task.fields[figures]}"), console=RichConsole(stderr=True))
        self._task = self._bar.add_task(what, total=total, completed=done, figures="")
        self._bar.start()

    def step(self, what: str, done: int, total: int, figures: str = "") -> None:
        """Progress: the bar moves, or a line is written when the last one is some seconds old."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)
        elif not self.quiet and (time.monotonic() - self._said > self.every or done == total):
            self._said = time.monotonic()
            self._write(f"llmkit: {what} {done}/{total} {figures}".rstrip())

    def end(self) -> None:
        """Ends a progress."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """The items, with a progress around them."""
        self.start(what, total)
        try:
            for index, item in enumerate(items, 1):
                yield item
                self.step(what, index, total)
        finally:
            self.end()

    def _write(self, text: str) -> None:
        if self.mute:
            return
        try:
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - this is where printing happens
        except (OSError, ValueError):
            self.quiet = True  # the reader has gone; the run goes on
