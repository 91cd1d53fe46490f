"""What vLLM is asked, in its words, and what it cannot do.

Its fields are those of ours one for one; where it would do something else than what is asked without a word (a
temperature that it raises, a bias that it cuts), the request is refused by the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.inference.node import COOLEST, HOTTEST
from llmkit.inference.request import Ask, Completion, Output, RequestError, Token
from llmkit.inference.sampling import Sampling
from llmkit.inference.text import Texts
from llmkit.inference.writer import refuse, refuse_functions

NAMES = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "max_tokens", "min_tokens", "seed", "n")},
    **{name: name for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos")},
    **{name: name for name in ("stop", "bad_words", "logit_bias", "logprobs", "prompt_logprobs")},
    **{"stop_ids": "stop_token_ids", "allowed_ids": "allowed_token_ids"},
}
"""Our name of what it does as the engine does it -> its own."""
BIAS = 100.0
"""What it cuts a token's bias to."""


def check_sampling(sampling: Sampling) -> None:
    """Raises: RequestError when `sampling` asks for what vLLM does not do, or does otherwise."""
    refuse("vllm", sampling, (*NAMES, "grammar"))
    warm = sampling.temperature
    if warm and not COOLEST <= warm <= HOTTEST:
        _no("temperature", f"draws at {COOLEST} to {HOTTEST}, not at {warm:g}", f"use 0, or {COOLEST} to {HOTTEST}")
    if not warm and sampling.n > 1:
        _no("n", "gives one greedy answer", "leave n out, or set temperature")
    if wide := [bias for bias in sampling.logit_bias.values() if abs(bias) > BIAS]:
        _no("logit_bias", f"has none beyond {BIAS:g}, not {wide[0]:g}", f"use -{BIAS:g} to {BIAS:g}")
    if sampling.grammar is not None:
        sampling.grammar.source()


def check(ask: Ask) -> Ask:
    """The ask.

    Raises:
        RequestError: it asks for what vLLM does not do.
    """
    check_sampling(ask.sampling)
    refuse_functions("vllm", ask)
    if not ask.prompt.ids:
        raise RequestError("holds no tokens", fix="ask something", key="prompt")
    return ask


def _no(key: str, what: str, fix: str) -> None:
    raise RequestError(f"generator vllm {what}", fix=fix, key=key)


def said(sampling: Sampling) -> dict[str, Any]:
    """The fields by vLLM's names, but for a grammar; what has no meaning when it is empty is left out."""
    made = {theirs: getattr(sampling, ours) for ours, theirs in NAMES.items()}
    made = {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}
    return {name: value for name, value in made.items() if value is not None and value != [] and value != {}}


Told = Mapping[int, float]
"""Tokens of one place and their log-probabilities: the one that is there, and the likeliest."""


def output(
    texts: Texts, sampling: Sampling, ids: list[int], why: tuple[str, Any], told: Sequence[Told] | None
) -> Output:
    """One answer, with the text that the engine makes of these tokens. `why`: vLLM's finish reason and stop reason. The
    token that ended it is none of it, and a reason is told where the request named it: vLLM tells the model's other
    ends too, and of the first of them no reason, named or not."""
    finish, stopped = why
    if finish == "stop" and stopped is None and ids and ids[-1] in sampling.stop_ids:
        stopped = ids[-1]
    kept = len(ids) - (finish == "stop" and not isinstance(stopped, str))
    law = None if sampling.temperature else 0.0
    tokens = tuple(
        Token(id, place[id], law, likeliest(place, sampling.logprobs))
        for id, place in zip(ids[:kept], (told or ())[:kept], strict=told is not None)
    )
    named = isinstance(stopped, str) or stopped in sampling.stop_ids
    text = texts.whole(ids[:kept], sampling)
    return Output(text, tuple(ids[:kept]), finish, tokens, stopped if named else None)


def completion(ask: Ask, outputs: Sequence[Output], told: Sequence[Told | None] | None, cached: int = 0) -> Completion:
    """All answers to a prompt. `told`: of the tokens of the prompt, where it was asked for; the first has none."""
    most, ids = ask.sampling.prompt_logprobs, ask.prompt.ids
    prompt = None
    if most is not None and told is not None:
        prompt = tuple(
            None if place is None else Token(id, place[id], place[id], likeliest(place, most))
            for id, place in zip(ids, told, strict=True)
        )
    return Completion(tuple(outputs), len(ids), prompt, cached)


def likeliest(told: Told, most: int | None) -> dict[int, float]:
    """So many; beside them the place's own token is told, even where it is none of them."""
    return dict(sorted(told.items(), key=lambda one: -one[1])[: most or 0])
