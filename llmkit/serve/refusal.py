"""What a client is told when it is refused: a status and an error in OpenAI's shape, without internals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from llmkit.core.errors import LlmkitError, Problem, one_line, without_logins

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
LONGEST = 500
"""Letters of a message: what a client wrote is told back, but not all of it."""


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, what: str, *, key: str | None = None, code: str | None = None, wait: float | None = None
    ) -> None:
        """`key` is the field that is wrong; `wait` is after how many seconds it is worth asking again; without it, it
        is not."""
        super().__init__(what)
        self.status, self.what, self.key, self.code, self.wait = status, what, key, code, wait

    @property
    def error(self) -> dict[str, Any]:
        """The object in a body or in a stream."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        what = one_line(without_logins(self.what))
        short = what if len(what) <= LONGEST else what[:LONGEST] + "..."
        key = self.key and self.key[:LONGEST]
        return {"error": {"message": short, "type": kind, "param": key, "code": self.code}}

    @property
    def body(self) -> bytes:
        """As JSON."""
        return json.dumps(self.error).encode()

    @property
    def headers(self) -> Mapping[str, str]:
        """What tells a client whether to come back."""
        if self.wait is not None:
            return {"retry-after": str(max(1, math.ceil(self.wait))), "x-should-retry": "true"}
        return {"x-should-retry": "false"}


class Fault(Refusal):
    """What nobody foresaw in the engine's process."""

    def __init__(self, trace: str) -> None:
        """`trace` is for the log, and for no client."""
        super().__init__(500, "the server met a fault of its own", code="internal_error")
        self.trace = trace


NAMES = {"grammar": "response_format", "stop_ids": "stop_token_ids", "allowed_ids": "allowed_token_ids"}
"""What the engine calls otherwise than its clients."""


def refused(cause: LlmkitError) -> Refusal:
    """What is wrong with a field, as the engine and the readers of settings say it."""
    return problem(cause.problems[0])


def problem(said: Problem) -> Refusal:
    """The same of one problem."""
    key = NAMES.get(said.key, said.key)
    text = f"{key}: {said.what}" if key else said.what
    return Refusal(400, f"{text}; {said.fix}" if said.fix else text, key=key or None, code="invalid_value")
