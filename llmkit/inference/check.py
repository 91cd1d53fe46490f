"""Whether a request can ever be answered; each refusal names its field."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.inference.request import Request, RequestError
from llmkit.inference.scheduler import Limits


@dataclass(frozen=True)
class Facts:
    """What a model can be asked."""

    words: int
    """Rows of its vocabulary."""
    longest: int
    """Tokens of a prompt and its answer together."""
    ends: tuple[int, ...]
    """Tokens that end a text by themselves."""


def check(request: Request, facts: Facts, limits: Limits) -> None:
    """All but its length, for which an adapter counts too.

    Raises:
        RequestError: it can never be answered.
    """
    sampling = request.sampling
    if not request.prompt:
        raise RequestError("holds no tokens", fix="ask something", key="prompt")
    if sampling.n > limits.sequences:
        raise RequestError(f"{sampling.n} answers at once", fix=f"ask for at most {limits.sequences}", key="n")
    check_beams(request, limits)
    lists = {
        "prompt": request.prompt,
        "stop_ids": sampling.stop_ids,
        "allowed_ids": sampling.allowed_ids,
        "logit_bias": tuple(sampling.logit_bias),
    }
    for key, ids in lists.items():
        if wrong := [id for id in ids if not 0 <= id < facts.words]:
            what = f"token {wrong[0]} is none of the {facts.words} of the vocabulary"
            raise RequestError(what, fix="give tokens of this model", key=key)


def check_beams(request: Request, limits: Limits) -> None:
    """
    Raises:
        RequestError: what is asked does not go with beams.
    """
    sampling = request.sampling
    if sampling.beams == 1:
        return
    if sampling.beams > limits.sequences:
        what = f"{sampling.beams} texts at once"
        raise RequestError(what, fix=f"ask for at most {limits.sequences}", key="beams")
    if sampling.n > sampling.beams:
        what = f"{sampling.n} of {sampling.beams} beams"
        raise RequestError(what, fix=f"ask for at most {sampling.beams}", key="n")
    if sampling.temperature:
        raise RequestError("beams are not sampled", fix="give temperature 0", key="temperature")
    if sampling.stop:
        raise RequestError("texts do not end beams", fix="give stop_ids", key="stop")


def check_length(request: Request, longest: int) -> None:
    """
    Raises:
        RequestError: the prompt and its answer are longer than `longest`.
    """
    asked = len(request.prompt) + request.sampling.max_tokens
    if len(request.prompt) >= longest:
        what = f"has {len(request.prompt)} tokens; the model takes {longest}, the answer included"
        raise RequestError(what, fix="ask for less", key="prompt")
    if asked > longest:
        most, max_tokens = longest - len(request.prompt), request.sampling.max_tokens
        what = f"{max_tokens} after a prompt of {len(request.prompt)} is past the {longest} that there are"
        raise RequestError(what, fix=f"give at most {most}", key="max_tokens")
