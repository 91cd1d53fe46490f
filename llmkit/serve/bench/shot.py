"""One request and what came of it, in seconds since the load began."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from llmkit.serve.bench.http import Failed
from llmkit.serve.bench.load import Asked

Send = Callable[[Asked], AsyncGenerator[dict[str, Any], None]]
"""Asks, and gives the events of the answer."""
OURS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)
"""Of system calls that fail for want of something on this side."""


@dataclass
class Shot:
    """What is known of a request."""

    number: int
    due: float
    """When it was to begin."""
    began: float
    times: list[float] = field(default_factory=list)
    """When each piece of text came."""
    ended: float = 0.0
    error: str = ""
    status: int = 200
    ours: bool = False
    """Whether it failed for want of something on the client's side."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server says; 0 where it does not."""
    finish: str = ""
    category: str = ""
    accepted: int | None = None
    """Tokens that were drafted; none where the server does not say."""
    rejected: int = 0
    """Drafts that were looked at in vain."""

    @property
    def good(self) -> bool:
        """Whether it was answered."""
        return not self.error

    @property
    def delay(self) -> float:
        """How late the client was."""
        return self.began - self.due

    @property
    def tokens(self) -> int:
        """That were made: as the server says, else pieces."""
        return self.completion_tokens or len(self.times)

    @property
    def first(self) -> float:
        """Time to the first piece of text."""
        return self.times[0] - self.began

    @property
    def whole(self) -> float:
        """Time to the end."""
        return self.ended - self.began

    @property
    def gaps(self) -> list[float]:
        """Times between pieces."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def between(self) -> float:
        """The mean time between tokens, also where several come in one piece."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else 0.0


async def shoot(
    shot: Shot, asked: Asked, send: Send, clock: Callable[[], float], timeout: float, said: list[str]
) -> Shot:
    """Carries one out; what goes wrong is part of the result. The pieces of its text are added to `said`."""
    shot.category = asked.category
    try:
        async with asyncio.timeout(timeout), aclosing(send(asked)) as events:
            async for event in events:
                _take(shot, event, clock)
                said += _texts(event)
    except Failed as cause:
        shot.error, shot.status = str(cause), cause.status
    except TimeoutError:
        shot.error, shot.status = f"no end after {timeout:g} s", 0
    except (OSError, EOFError, ValueError) as cause:
        shot.error, shot.status = f"{type(cause).__name__}: {cause}"[:200], 0
        shot.ours = isinstance(cause, OSError) and cause.errno in OURS
    shot.ended = clock()
    if shot.good and not shot.finish:
        shot.error = "the answer has no end"
    elif shot.good and not shot.times:
        shot.error = "the answer is empty"
    return shot


def _take(shot: Shot, event: dict[str, Any], clock: Callable[[], float]) -> None:
    usage = event.get("usage")
    if isinstance(usage, dict):
        shot.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        shot.completion_tokens = int(usage.get("completion_tokens") or 0)
        details = usage.get("completion_tokens_details")
        if isinstance(details, dict) and details.get("accepted_prediction_tokens") is not None:
            shot.accepted = int(details["accepted_prediction_tokens"])
            shot.rejected = int(details.get("rejected_prediction_tokens") or 0)
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice
        if any(delta.get(key) for key in ("content", "text", "reasoning_content", "reasoning", "tool_calls")):
            shot.times.append(clock())
        shot.finish = choice.get("finish_reason") or shot.finish


def _texts(event: dict[str, Any]) -> list[str]:
    """What of an answer an event brings, but for thoughts and calls."""
    deltas = (choice.get("delta") or choice for choice in event.get("choices") or ())
    return [text for delta in deltas if isinstance(text := delta.get("content") or delta.get("text"), str)]
