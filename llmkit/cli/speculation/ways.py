"""Ways of choosing the next token: each that the engine has, in requests that it is tried with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from llmkit.inference.grammar import Choice, JsonSchema, Regex
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling

KNOWN = 40
"""Tokens that prompts are made of."""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yes"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}

WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 8},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "drawn": {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "several": {"temperature": 0.8, "n": 3},
    "told": {"temperature": 0.7, "logprobs": 3, "prompt_logprobs": 1},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "bias": {"temperature": 0.8, "logit_bias": {7: 3.0, 9: 4.0, 11: -5.0}},
    "bad words": {"bad_words": ("ab", "e", "th")},
    "bounded": {"min_tokens": 6, "stop_ids": (5, 6), "logit_bias": {7: 3.0, 9: 4.0}, "bad_words": ("ab",)},
    "stopped": {"temperature": 1.5, "stop": ("e", "th")},
    "allowed": {"temperature": 1.0, "allowed_ids": tuple(range(2, 12))},
    "on": {"ignore_eos": True, "temperature": 0.5},
    "beams": {"beams": 3},
    "regex": {"grammar": Regex(pattern="[a-h]{2,9}"), "temperature": 1.0},
    "schema": {"grammar": JsonSchema.of(SCHEMA), "temperature": 1.0, "logprobs": 1},
    "choice": {"grammar": Choice(choices=("the", "a hat", "an axe", "theory")), "temperature": 1.5},
    "drafts": {"temperature": 0.8, "drafts": 1},
    "processors": {"temperature": 0.9, "processors": True},
}


def move(prompt: Sequence[int], made: Sequence[int], logits: Tensor) -> Tensor:
    """A processor of a request's own."""
    return logits + (len(made) % 3) * logits.roll(1)


def asked(seed: int, count: int, way: str, pool: Sequence[int] = range(KNOWN), **more: Any) -> list[Request]:
    """Requests of one way, whose prompts repeat themselves and begin alike now and then; `pool`: the tokens that they
    are made of; `more`: of each `Request`."""
    drawn, made = random.Random(seed), list[Request]()
    shared = [drawn.choice(pool) for _ in range(8)]
    said = dict(WAYS[way])
    own = (move,) if said.pop("processors", False) else ()
    for at in range(count):
        start = [drawn.choice(pool) for _ in range(drawn.randint(1, 5))]
        prompt = tuple(shared * drawn.randint(0, 1) + start * drawn.randint(1, 3))
        how = Sampling(**{"max_tokens": drawn.randint(6, 16), "seed": at, **said})
        made.append(Request(f"{way}{seed}-{at}", prompt, how, processors=own, **more))
    return made
