"""Somebody's HTTP endpoint: so many requests at once, in order, and tries with growing waits."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import httpx

from llmkit.core.errors import ResourceError
from llmkit.inference.request import RequestError

AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Statuses that pass."""
LONGEST = 60.0
"""Seconds between two tries."""
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Manners:
    """How an endpoint is asked."""

    url: str
    """Up to and with `/v1`."""
    key: str
    at_once: int
    """Requests that are under way together."""
    tries: int
    """Of one request."""
    timeout: float
    """Seconds of one try."""
    named: str = "generator"
    """What the recipe calls it."""


class Endpoint:
    """Asks, from threads of its own."""

    def __init__(self, manners: Manners, sleep: Callable[[float], None] = time.sleep) -> None:
        self.manners, self.sleep = manners, sleep
        told = {"Authorization": f"Bearer {manners.key}"} if manners.key else {}
        self.client = httpx.Client(headers=told, timeout=manners.timeout, trust_env=False)
        self.pool = ThreadPoolExecutor(manners.at_once, "llmkit-endpoint")

    def each(self, asks: Iterable[A], answered: Callable[[A], B]) -> Iterator[B]:
        """What `answered` makes of each, in their order; asks are taken as there is room for them."""
        coming, flying = iter(asks), deque[Future[B]]()
        try:
            while True:
                for ask in islice(coming, 2 * self.manners.at_once - len(flying)):
                    flying.append(self.pool.submit(answered, ask))
                if not flying:
                    return
                yield flying.popleft().result()
        finally:
            for one in flying:
                one.cancel()

    def post(self, route: str, body: Mapping[str, Any], read: Callable[[Any], B]) -> B:
        """What `read` makes of the answer.

        Raises:
            RequestError: the endpoint refuses what it is asked.
            ResourceError: it cannot be reached, stays overloaded, or answers what cannot be read.
        """
        said = self._tried(f"{self.manners.url.rstrip('/')}/{route}", body)
        try:
            return read(said)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as cause:
            what = f"{self.manners.url} answered with something else than a completion"
            raise ResourceError(what, fix="give the address of an OpenAI endpoint", key=self._url) from cause

    def close(self) -> None:
        """Waits for what is under way."""
        self.pool.shutdown(cancel_futures=True)
        self.client.close()

    def _tried(self, url: str, body: Mapping[str, Any]) -> Any:
        why = ""
        for turn in range(self.manners.tries):
            try:
                answer = self.client.post(url, json=body)
            except httpx.TransportError as cause:
                why, wait = f"cannot be reached ({type(cause).__name__})", None
            else:
                if answer.status_code not in AGAIN:
                    return _checked(url, answer, self.manners.named)
                why, wait = f"answers {answer.status_code}", answer.headers.get("retry-after", "")
            if turn + 1 < self.manners.tries:
                self.sleep(_pause(turn, wait))
        what = f"{self.manners.url} {why}, {self.manners.tries} times"
        fix = f"see that it runs, or raise {self.manners.named}.tries"
        raise ResourceError(what, fix=fix, key=self._url)

    @property
    def _url(self) -> str:
        """The key of its address."""
        return f"{self.manners.named}.url"


def _checked(url: str, answer: httpx.Response, named: str) -> Any:
    """What a final answer holds."""
    try:
        said = answer.json()
    except ValueError:
        said = None
    if answer.is_success:
        return said
    error = said.get("error") if isinstance(said, dict) else None
    why = str(error.get("message") if isinstance(error, dict) else answer.reason_phrase)[:200]
    what = f"{url} refuses it ({answer.status_code}: {why})"
    if answer.status_code == 404 and "/v1/" not in url:  # the address of a server, and not of its routes
        raise RequestError(what, fix="let the url end in /v1", key=f"{named}.url")
    raise RequestError(what, fix="ask otherwise", key=named)


def _pause(turn: int, wait: str | None) -> float:
    """Seconds: what the endpoint asks for, or twice as long each time, a little apart from others that wait."""
    if wait and wait.isascii() and wait.replace(".", "", 1).isdigit():
        return min(float(wait), LONGEST)
    return min(LONGEST, float(0.5 * 2**turn)) * (0.5 + random.random() / 2)
