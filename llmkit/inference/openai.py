"""Text from an endpoint that speaks OpenAI's routes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from llmkit.inference.endpoint import Endpoint, Manners
from llmkit.inference.node import SPOKEN, OpenAi
from llmkit.inference.request import Ask, Completion, Output
from llmkit.inference.writer import refuse, refuse_functions


class OpenAiWriter:
    """The `openai` member of the `generator` union, open. Its completions have no token ids."""

    def __init__(self, node: OpenAi, sleep: Callable[[float], None] = time.sleep) -> None:
        self.node = node
        self.endpoint = Endpoint(Manners(node.url, node.key, node.at_once, node.tries, node.timeout), sleep)

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order.

        Raises:
            RequestError: one asks for what the routes have no word for, or the endpoint refuses it.
            ResourceError: the endpoint cannot be reached, or stays overloaded.
        """
        return self.endpoint.each(map(_checked, asks), self._answered)

    def close(self) -> None:
        """Waits for what is under way."""
        self.endpoint.close()

    def _answered(self, ask: Ask) -> Completion:
        route, body = _body(self.node.model, ask)
        return self.endpoint.post(route, body, _completion)


def _checked(ask: Ask) -> Ask:
    refuse("openai", ask.sampling, SPOKEN)
    refuse_functions("openai", ask)
    return ask


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


def _completion(said: Mapping[str, Any]) -> Completion:
    outputs = tuple(_output(choice) for choice in said["choices"])
    return Completion(outputs, int((said.get("usage") or {}).get("prompt_tokens", 0)))


def _output(choice: Mapping[str, Any]) -> Output:
    text = choice["message"].get("content") or "" if "message" in choice else choice["text"]
    return Output(str(text), (), str(choice.get("finish_reason") or "stop"))
