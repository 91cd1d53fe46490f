"""Text from an endpoint that speaks OpenAI's routes: so many requests at once, and tries with growing waits."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import httpx

from llmkit.core.errors import ResourceError
from llmkit.inference.node import SPOKEN, OpenAi
from llmkit.inference.request import Ask, Completion, Output, RequestError
from llmkit.inference.writer import refuse

AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Statuses that pass."""
LONGEST = 60.0
"""Seconds between two tries."""


class OpenAiWriter:
    """The `openai` member of the `generator` union, open. Its completions have no token ids."""

    def __init__(self, node: OpenAi, sleep: Callable[[float], None] = time.sleep) -> None:
        self.node, self.sleep = node, sleep
        told = {"Authorization": f"Bearer {node.key}"} if node.key else {}
        self.client = httpx.Client(headers=told, timeout=node.timeout, trust_env=False)
        self.pool = ThreadPoolExecutor(node.at_once, "llmkit-openai")

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order.

        Raises:
            RequestError: one asks for what the routes have no word for, or the endpoint refuses it.
            ResourceError: the endpoint cannot be reached, or stays overloaded.
        """
        coming, flying = iter(asks), deque[Future[Completion]]()
        try:
            while True:
                for ask in islice(coming, 2 * self.node.at_once - len(flying)):
                    refuse("openai", ask.sampling, SPOKEN)
                    flying.append(self.pool.submit(self._answered, ask))
                if not flying:
                    return
                yield flying.popleft().result()
        finally:
            for one in flying:
                one.cancel()

    def close(self) -> None:
        """Waits for what is under way."""
        self.pool.shutdown(cancel_futures=True)
        self.client.close()

    def _answered(self, ask: Ask) -> Completion:
        route, body = _body(self.node.model, ask)
        said = self._tried(f"{self.node.url.rstrip('/')}/{route}", body)
        try:
            outputs = tuple(_output(choice) for choice in said["choices"])
            usage = said.get("usage") or {}
            return Completion(outputs, int(usage.get("prompt_tokens", 0)))
        except (KeyError, TypeError, ValueError, IndexError) as cause:
            what = f"{self.node.url} answered with something else than a completion"
            raise ResourceError(what, fix="give the address of an OpenAI endpoint", key="generator.url") from cause

    def _tried(self, url: str, body: Mapping[str, Any]) -> Any:
        why = ""
        for turn in range(self.node.tries):
            try:
                answer = self.client.post(url, json=body)
            except httpx.TransportError as cause:
                why, wait = f"cannot be reached ({type(cause).__name__})", None
            else:
                if answer.status_code not in AGAIN:
                    return _checked(url, answer)
                why, wait = f"answers {answer.status_code}", answer.headers.get("retry-after", "")
            if turn + 1 < self.node.tries:
                self.sleep(_pause(turn, wait))
        what = f"{self.node.url} {why}, {self.node.tries} times"
        raise ResourceError(what, fix="see that it runs, or raise generator.tries", key="generator.url")


def _checked(url: str, answer: httpx.Response) -> Any:
    """What a final answer holds."""
    try:
        said = answer.json()
    except ValueError:
        said = None
    if answer.is_success:
        return said
    error = said.get("error") if isinstance(said, dict) else None
    why = str(error.get("message") if isinstance(error, dict) else answer.reason_phrase)[:200]
    raise RequestError(f"{url} refuses it ({answer.status_code}: {why})", fix="ask otherwise", key="generator")


def _pause(turn: int, wait: str | None) -> float:
    """Seconds: what the endpoint asks for, or twice as long each time, a little apart from others that wait."""
    if wait and wait.replace(".", "", 1).isdigit():
        return min(float(wait), LONGEST)
    return min(LONGEST, float(0.5 * 2**turn)) * (0.5 + random.random() / 2)


def _body(model: str, ask: Ask) -> tuple[str, dict[str, Any]]:
    """The route, and what is sent there: messages as they were said, a text, or else tokens."""
    prompt, sampling = ask.prompt, ask.sampling
    body: dict[str, Any] = {"model": ask.adapter or model, "max_tokens": sampling.max_tokens, "n": sampling.n}
    body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    more = {"stop": list(sampling.stop), "presence_penalty": sampling.presence_penalty}
    more |= {"frequency_penalty": sampling.frequency_penalty}
    more |= {"logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()}}
    body |= {key: value for key, value in more.items() if value}
    if isinstance(prompt.said, str):
        return "completions", body | {"prompt": prompt.said or list(prompt.ids)}
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return "chat/completions", body | {"messages": [dict(message) for message in prompt.said]} | tools


def _output(choice: Mapping[str, Any]) -> Output:
    text = choice["message"].get("content") or "" if "message" in choice else choice["text"]
    return Output(str(text), (), str(choice.get("finish_reason") or "stop"))
