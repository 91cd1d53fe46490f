"""What the command line says when a verb is over, and the streams that it says it on."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from types import TracebackType
from typing import Any

from llmkit.core.errors import Problem

TURN = 5.0
"""Seconds that a rank which does not speak waits with its end: a launcher ends all others as soon as one has failed,
and rank 0 is still to say why."""


def open_streams() -> None:
    """Standard streams that were closed before we began lead nowhere: a file of ours must not get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def flush() -> None:
    """What was printed is out, or its reader is gone."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone: Python must not try again at its end


def leave(code: int) -> None:
    """The exit status of the first rank that fails goes where our scripts look for it: torchrun turns all into 1."""
    if code and (path := os.environ.get("LLMKIT_EXIT_FILE")):
        with contextlib.suppress(OSError):
            os.write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), str(code).encode())


def at_once(code: int) -> None:
    """One of several ranks ends here: a collective that others have left could keep the interpreter from its end."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        flush()
        os._exit(code)


def own_fault(debug: bool, kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """What nobody foresaw is one line too; Python then exits 1."""
    if debug:
        traceback.print_exception(kind, fault, trace)
    why = next(iter(str(fault).strip().splitlines()), "")
    say([Problem(f"llmkit met a fault of its own ({kind.__name__}: {why})", "run again with --debug and report it")], 1)
    at_once(1)


def returned(value: Any) -> int:
    """What a verb gave, as an exit status."""
    return value if isinstance(value, int) else 0


def say(problems: Any, code: int, aloud: bool | None = None) -> int:
    """One line a problem, on standard error; under a launcher rank 0 speaks, and on other hosts the first rank of each
    before they are one group (`aloud` None): what only that host lacks nobody else knows."""
    first = aloud is None and os.environ.get("LOCAL_RANK", "0") == "0"
    if aloud or first or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError, ValueError):
            for problem in problems:
                sys.stderr.write(f"llmkit: error: {problem}\n")
            sys.stderr.flush()
    elif aloud is None and code:
        time.sleep(TURN)
    return code
