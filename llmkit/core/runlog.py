"""`run.log`: what the libraries have to say during a stage, with llmkit's own notices between; none of it is lost, none
of theirs is on the screen.

What a library writes to standard error by itself, below Python, stays there.
"""

from __future__ import annotations

import calendar
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from llmkit.core.environment import LIBRARIES
from llmkit.core.errors import LlmkitError, ResourceError, Stopped, one_line, without_logins
from llmkit.core.files import refused

NAME = "run.log"
OURS = logging.getLogger("llmkit")
MOST = 1000
"""Different lines that libraries may have written in one session; further ones are counted."""
LONGEST = 2000
"""Letters of a line's text."""


@contextmanager
def run_log(folder: Path, hide: Callable[[str], str]) -> Iterator[None]:
    """Until the end, log records and warnings go to the folder's `run.log`, after what is there; `hide` hides secrets.

    Raises:
        ResourceError: the disk refuses.
    """
    log = RunLog(folder / NAME, hide)
    with _taken(log):
        try:
            OURS.info("begins, pid %d", os.getpid())
            yield
            log.end("ends")
        except BaseException as cause:
            with suppress(ResourceError):  # the first fault is the one to tell
                _say_why(cause)
                log.end("ends")
            raise


class RunLog(logging.Handler):
    """Appends a line for each record that says something new; the same again is counted, and told at the end."""

    def __init__(self, path: Path, hide: Callable[[str], str]) -> None:
        super().__init__(logging.INFO)
        self.path, self.hide = path, hide
        self.seen: dict[str, int] = {}
        self.room, self.left_out = MOST, 0
        self.fault: ResourceError | None = None
        # the wall clock is asked once: it may leap, and the lines' times must not
        self.begun, self.since = calendar.timegm(time.gmtime()), time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """A library is never thrown an error for what it says; our own next notice raises it.

        Raises:
            ResourceError: the disk refuses.
        """
        ours = record.name == OURS.name
        text = one_line(without_logins(self.hide(_said(record))))[:LONGEST]
        line = f"{record.levelname} {record.name}: {text}"
        if line in self.seen:
            self.seen[line] += 1
        elif ours or self._has_room(record):
            self.seen[line] = 1
            self._write(line)
        if ours and self.fault is not None:
            raise self.fault

    def _has_room(self, record: logging.LogRecord) -> bool:
        """Whether something new from a library is kept."""
        if record.levelno < logging.WARNING:
            return False
        self.room -= 1
        self.left_out += self.room < 0
        return self.room >= 0

    def end(self, what: str) -> None:
        """Tells what was said more than once.

        Raises:
            ResourceError: the disk refused a line.
        """
        for line, times in self.seen.items():
            if times > 1:
                self._write(f"{line} [{times} times]")
        if self.left_out:
            self._write(f"WARNING {OURS.name}: {self.left_out} further lines are left out")
        OURS.info(what)

    def _write(self, line: str) -> None:
        passed = time.monotonic() - self.since
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.begun + passed))
        try:
            with self.path.open("ab") as file:
                file.write(f"{at}.{int(passed % 1 * 1000):03}Z {line}\n".encode())
        except OSError as cause:
            self.fault = self.fault or refused(cause, "writing", self.path)


def _said(record: logging.LogRecord) -> str:
    """Its text, with the error that it tells of."""
    try:
        text = record.getMessage()
    except (LookupError, TypeError, ValueError):  # a library's own slip
        text = f"{record.msg} {record.args}"
    return f"{text} ({record.exc_info[1]!r})" if record.exc_info and record.exc_info[1] else text


def _say_why(cause: BaseException) -> None:
    why = str(cause) if isinstance(cause, LlmkitError) else f"{type(cause).__name__}: {cause}"
    OURS.log(logging.INFO if isinstance(cause, Stopped) else logging.ERROR, "%s", why)


@contextmanager
def _taken(log: RunLog) -> Iterator[None]:
    """The libraries' loggers and the warnings speak to `log`; handlers that an application made stay as they are."""
    # what gives its loggers handlers when it is imported is imported first
    import torch  # noqa: F401
    from transformers.utils import logging as chatter  # noqa: F401

    with ExitStack() as undo, warnings.catch_warnings():
        undo.callback(log.close)
        root = logging.root
        _change(undo, root, [*root.handlers, log], root.propagate, root.level)
        _change(undo, OURS, [log], False, logging.INFO)
        for logger in _loggers():
            kept = [handler for handler in logger.handlers if type(handler) is not logging.StreamHandler]
            alone = len(kept) < len(logger.handlers) and not logger.propagate
            level = logging.WARNING if logger.name in LIBRARIES else logger.level
            _change(undo, logger, [*kept, log] if alone else kept, logger.propagate, level)
        _late(undo, log)
        warnings.filterwarnings("default", module="|".join(LIBRARIES))
        warnings.showwarning = _warned
        yield


def _late(undo: ExitStack, log: RunLog) -> None:
    """DeepSpeed's logger gets a handler of its own, to standard output, when another library imports it midway."""
    logger = logging.getLogger("DeepSpeed")

    def taken(record: logging.LogRecord) -> bool:
        if all(type(handler) is not logging.StreamHandler for handler in logger.handlers):
            return True
        log.handle(record)
        return False

    logger.addFilter(taken)
    undo.callback(logger.removeFilter, taken)


def _loggers() -> list[logging.Logger]:
    """The libraries' own and those below them."""
    for name in LIBRARIES:
        logging.getLogger(name)
    known = logging.root.manager.loggerDict.items()
    found = [logger for name, logger in known if name in LIBRARIES or name.split(".")[0] in LIBRARIES]
    return [logger for logger in found if isinstance(logger, logging.Logger)]


def _change(
    undo: ExitStack, logger: logging.Logger, handlers: list[logging.Handler], propagate: bool, level: int
) -> None:
    undo.callback(_set, logger, logger.handlers, logger.propagate, logger.level)
    _set(logger, handlers, propagate, level)


def _set(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool, level: int) -> None:
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = f"{category.__name__}: {message} ({Path(filename).name}:{lineno})"
    logging.getLogger("py.warnings").warning("%s", text)
