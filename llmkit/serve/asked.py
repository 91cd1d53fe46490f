"""From the fields that chat and completions share to how the next token is chosen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llmkit.core.errors import LlmkitError
from llmkit.inference.sampling import Sampling
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.foretold import drafts
from llmkit.serve.form import form
from llmkit.serve.kinds import parse
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal, refused
from llmkit.serve.shapes import LARGEST, Sampled

OTHERWISE = ("stop_token_ids", "allowed_token_ids", "response_format", "structured_outputs", "speculation")
"""Fields that the engine calls otherwise."""


def sampling(
    fields: Fields, bounds: Bounds, max_tokens: int, more: Mapping[str, Any], schema: Mapping[str, Any] | None = None
) -> Sampling:
    """How an answer of at most `max_tokens` is sampled; `more` is what the routes read in their own ways, `schema` what
    a required call of a tool must follow.

    Raises:
        Refusal: a field is out of bounds, or two contradict.
    """
    said = parse(Sampled, fields, bounds)
    given = {name: value for name, value in vars(said).items() if name not in OTHERWISE} | {
        "top_p": said.top_p or 1e-9,
        "top_k": max(0, said.top_k),
        "stop_ids": said.stop_token_ids,
        "allowed_ids": said.allowed_token_ids,
        "logit_bias": bias(fields),
        "max_tokens": max_tokens,
        "seed": fresh() if said.seed is None else said.seed & LARGEST,
        "grammar": form(fields, schema),
        "drafts": drafts(fields),
    }
    try:
        return Sampling(**given, **more)
    except LlmkitError as cause:
        raise refused(cause) from cause


def fresh() -> int:
    """A seed by chance."""
    import secrets

    return secrets.randbits(63)


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


def until(deadline: float | None, header: float | None, bounds: Bounds) -> float | None:
    """When, on `time.monotonic`'s clock, nobody waits for it any longer: after the client's `deadline`, in seconds, or
    what its header says, or the server's own."""
    given = header if deadline is None else deadline
    seconds = bounds.deadline if given is None else given
    return None if seconds is None else time.monotonic() + seconds


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
