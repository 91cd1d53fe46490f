"""From the fields that chat and completions share to how the next token is chosen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llmkit.core.errors import LlmkitError
from llmkit.inference.sampling import Sampling
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.form import form
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal, refused

LARGEST = 2**63 - 1
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
)
"""What OpenAI's clients send and nothing follows from here; `user` is the unit of the request's record."""


def sampling(
    fields: Fields, bounds: Bounds, max_tokens: int, more: Mapping[str, Any], schema: Mapping[str, Any] | None = None
) -> Sampling:
    """How an answer of at most `max_tokens` is sampled; `more` is what the routes read in their own ways, `schema` what
    a required call of a tool must follow.

    Raises:
        Refusal: a field is out of bounds, or two contradict.
    """
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 1.0, 0.0, 2.0),
        "top_p": fields.number("top_p", 1.0, 0.0, 1.0) or 1e-9,
        "top_k": max(0, fields.whole("top_k", 0, -1, 1 << 20)),
        "min_p": fields.number("min_p", 0.0, 0.0, 1.0),
        "n": fields.whole("n", 1, 1, bounds.n),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2.0, 2.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.01, 10.0),
        "stop": stops(fields),
        "stop_ids": fields.ids("stop_token_ids", 64),
        "allowed_ids": fields.ids("allowed_token_ids", 1 << 16),
        "bad_words": fields.texts("bad_words", 64),
        "ignore_eos": fields.flag("ignore_eos"),
        "min_tokens": fields.whole("min_tokens", 0, 0, max_tokens),
        "logit_bias": bias(fields),
        "max_tokens": max_tokens,
    }
    given |= {"seed": seed(fields), "grammar": form(fields, schema)}
    try:
        return Sampling(**given, **more)
    except LlmkitError as cause:
        raise refused(cause) from cause


def seed(fields: Fields) -> int:
    """The client's, or one that nobody knows."""
    value = fields.whole_or_none("seed", -LARGEST - 1, LARGEST)
    return fresh() if value is None else value & LARGEST


def fresh() -> int:
    """A seed by chance."""
    import secrets

    return secrets.randbits(63)


def stops(fields: Fields) -> tuple[str, ...]:
    """Texts that end an answer."""
    found = fields.texts("stop", 16)
    if any(not text or len(text) > 1000 for text in found):
        raise wrong(fields.name("stop"), "holds a text that is empty or longer than 1000 letters")
    return found


def bias(fields: Fields) -> dict[int, float]:
    """Token -> what is added to its logit."""
    held = fields.object("logit_bias")
    if held is None:
        return {}
    if len(held.held) > 1024:
        raise wrong(held.at, f"{len(held.held)} are more than 1024")
    made = {}
    for key in held.held:
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise wrong(held.name(key[:40]), "is no token's id")
        made[int(key)] = held.number(key, 0.0, -100.0, 100.0)
    return made


def deadline(fields: Fields, bounds: Bounds) -> float | None:
    """When, on `time.monotonic`'s clock, nobody waits for it any longer: after the client's `deadline`, in seconds."""
    seconds = fields.number("deadline", bounds.deadline or 0.0, 0.0, 86_400.0)
    return time.monotonic() + seconds if seconds else None


def most_tokens(given: int | None, prompt: int, longest: int, bounds: Bounds, default: int | None = None) -> int:
    """How many tokens an answer may have after a prompt of so many.

    Raises:
        Refusal: there is no room for so many.
    """
    room = min(longest - prompt, bounds.max_tokens or longest)
    if prompt >= longest:
        what = f"the prompt has {prompt} tokens; the model takes {longest}, the answer included"
        raise Refusal(400, what, key="prompt", code="context_length_exceeded")
    if given is None:
        return min(room, default or room)
    if given > room:
        what = f"max_tokens: {given} after a prompt of {prompt} is more than the {room} that there is room for"
        raise Refusal(400, what, key="max_tokens", code="context_length_exceeded")
    return given
