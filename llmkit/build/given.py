"""What an `LLM` is given to read: a wrong kind of thing is named with its place before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, cast

from llmkit.core.scalars import Origin
from llmkit.core.wording import Report, unknown
from llmkit.inference.request import RequestError
from llmkit.inference.sampling import Sampling

Said = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""What a model can be asked: a text that it goes on with, the tokens of one, or messages that it answers."""
FIX = "give a text, a list of token ids or a list of messages"


def several(given: Any, key: str) -> list[Any]:
    """One or many: a text by itself is a list of one.

    Raises:
        RequestError: it is neither a text nor a list.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, bytes | Mapping) or not isinstance(given, Sequence):
        raise RequestError(f"{_kind(given)} is no list of prompts", fix="give a list, or one text", key=key)
    return list(given)


def checked(said: Any, key: str) -> Said:
    """One that a model can read.

    Raises:
        RequestError: it is nothing that can be read.
    """
    if isinstance(said, str):
        return said
    if isinstance(said, Mapping):
        raise RequestError("one message is no prompt", fix=f"put it into a list; {FIX}", key=key)
    if isinstance(said, bytes) or not isinstance(said, Sequence):
        raise RequestError(f"{_kind(said)} is no prompt", fix=FIX, key=key)
    kinds = {int if isinstance(one, int) else Mapping if isinstance(one, Mapping) else type(one) for one in said}
    if not kinds <= {int} and not kinds <= {Mapping}:
        wrong = next(one for one in said if not isinstance(one, int | Mapping) or len(kinds) > 1)
        raise RequestError(f"a prompt with {_kind(wrong)} in it cannot be read", fix=FIX, key=key)
    return cast(Said, said)


def check_named(others: Mapping[str, Any], taker: Callable[..., Any]) -> None:
    """Arguments by names that `taker` has none of.

    Raises:
        RecipeError: with each of them, and the name that is nearest.
    """
    known = [name for name, one in signature(taker).parameters.items() if one.kind is not one.VAR_KEYWORD]
    report = Report()
    for name in others:
        unknown(name, name, known[1:], Origin(), report)
    report.stop_if_bad()


def check_sampling(sampling: Any) -> None:
    """Raises: RequestError where it is none, and no list of them."""
    listed = isinstance(sampling, Sequence) and not isinstance(sampling, str | bytes)
    for one in sampling if listed else [sampling]:
        if not isinstance(one, Sampling):
            raise RequestError(f"{_kind(one)} is no Sampling", fix="write Sampling(max_tokens=16, ...)", key="sampling")


def check_length(rows: Sequence[Sequence[int]], longest: int | None, key: str, least: int = 0) -> None:
    """Raises: RequestError where a row has more tokens than the model has positions, or fewer than `least`."""
    for at, row in enumerate(rows):
        if len(row) < least:
            raise RequestError("it has no tokens", fix="give a text that has some", key=f"{key}[{at}]")
        if longest is not None and len(row) > longest:
            what = f"{len(row)} tokens are more than the {longest} positions of the model"
            raise RequestError(what, fix="give a shorter text", key=f"{key}[{at}]")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
