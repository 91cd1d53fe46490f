"""Text from a running `vllm serve`: token ids go there and come back, so that its answers are those of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from llmkit.inference.endpoint import Endpoint, Manners
from llmkit.inference.request import Ask, Completion, Output, RequestError
from llmkit.inference.sampling import Sampling
from llmkit.inference.text import Texts
from llmkit.inference.vllm_words import check, completion, output, said


class VllmServed:
    """The `vllm` member of the `generator` union, open over HTTP."""

    def __init__(
        self,
        manners: Manners,
        model: str,
        texts: Texts,
        sleep: Callable[[float], None] = time.sleep,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        """`model`: by the name that it has there. `end` is called when all is closed."""
        self.model, self.texts, self.end = model, texts, end
        self.endpoint = Endpoint(manners, sleep)

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order.

        Raises:
            RequestError: one asks for what vLLM does not do, or the server refuses it.
            ResourceError: the server cannot be reached, or stays overloaded.
        """
        return self.endpoint.each(map(_checked, asks), self._answered)

    def close(self) -> None:
        """Waits for what is under way."""
        self.endpoint.close()
        self.end()

    def _answered(self, ask: Ask) -> Completion:
        return self.endpoint.post("completions", body(self.model, ask), partial(_completion, self.texts, ask))


def _checked(ask: Ask) -> Ask:
    """A server has a library for grammars of its own choice, and their languages differ."""
    if ask.sampling.grammar is not None and "grammar" in ask.sampling.grammar.named():
        what = "generator vllm by url has no lark: what its server reads is not known"
        raise RequestError(what, fix="use json_schema, regex or choice, or generator: engine", key="grammar")
    return check(ask)


def body(model: str, ask: Ask) -> dict[str, Any]:
    """What is sent to `/v1/completions`."""
    made = {"model": ask.adapter or model, "prompt": list(ask.prompt.ids), "return_token_ids": True}
    made |= said(ask.sampling) | {"return_tokens_as_token_ids": True, "add_special_tokens": False}
    if ask.sampling.logit_bias:
        made["logit_bias"] = {str(token): bias for token, bias in ask.sampling.logit_bias.items()}
    if ask.sampling.grammar is not None:
        made["structured_outputs"] = ask.sampling.grammar.named()
    return made


def _completion(texts: Texts, ask: Ask, told: Mapping[str, Any]) -> Completion:
    choices = sorted(told["choices"], key=lambda one: int(one["index"]))
    if any(one.get("token_ids") is None for one in choices):
        raise ValueError("no token ids: it is no vLLM, or one of before 0.10")
    prompt = choices[0].get("prompt_logprobs")
    places = None if prompt is None else [None if place is None else _numbers(place) for place in prompt]
    details = (told.get("usage") or {}).get("prompt_tokens_details") or {}
    outputs = [_output(texts, ask.sampling, one) for one in choices]
    return completion(ask, outputs, places, int(details.get("cached_tokens") or 0))


def _output(texts: Texts, sampling: Sampling, one: Mapping[str, Any]) -> Output:
    laid = one.get("logprobs")
    told = None if sampling.logprobs is None or laid is None else list(map(_place, *_columns(laid)))
    why = (str(one.get("finish_reason") or "stop"), one.get("stop_reason"))
    return output(texts, sampling, [int(id) for id in one["token_ids"]], why, told)


def _columns(laid: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    tokens = laid["tokens"]
    return tokens, laid["token_logprobs"], laid.get("top_logprobs") or [None] * len(tokens)


def _place(token: str, own: float, top: Mapping[str, float] | None) -> dict[int, float]:
    return {_id(name): float(value) for name, value in (top or {}).items()} | {_id(token): float(own)}


def _id(named: str) -> int:
    """Of `token_id:5`."""
    return int(named.removeprefix("token_id:"))


def _numbers(place: Mapping[str, Any]) -> dict[int, float]:
    return {int(id): float(one["logprob"]) for id, one in place.items()}
