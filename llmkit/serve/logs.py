"""The server's log: one JSON object a line, whatever a client wrote into it."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

from llmkit.core.errors import one_line, without_logins

OURS = logging.getLogger("llmkit.serve")
PLAIN = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
LONGEST = 2000
"""Letters of one value."""
TRACE = 20_000
"""The same of where a fault came from: its end tells most."""


class Lines(logging.Formatter):
    """A record as an object; what was given as `extra` is its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Escapes do the rest: JSON has no line breaks in texts."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        said: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "event": _short(record.getMessage())}
        said |= {key: _short(value) for key, value in vars(record).items() if key not in PLAIN}
        if "trace" in said:
            said["trace"] = without_logins(vars(record)["trace"])[-TRACE:].splitlines()
        if record.exc_info and record.exc_info[1] is not None:
            said["fault"] = _short(repr(record.exc_info[1]))
        return json.dumps(said)


def _short(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    return one_line(without_logins(str(value)))[:LONGEST]


def begin(stream: TextIO | None = None, level: str = "info") -> logging.Handler:
    """The server's log, and what uvicorn and asyncio say, go to `stream`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Lines())
    for name, least in (("llmkit.serve", level.upper()), ("uvicorn", "WARNING"), ("asyncio", "ERROR")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
    return handler
