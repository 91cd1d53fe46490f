"""A function of the user's own as a reward, in the process that scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llmkit.core.own import loaded
from llmkit.core.usercode import Code
from llmkit.rl.checked import Check, Told, Unscored

OURS = ("prompts", "completions", "completion_ids", "finish_reasons")


def function(code: Code) -> Callable[..., Any]:
    """The function."""
    made: Callable[..., Any] = loaded(code)
    if not callable(made):
        raise TypeError(f"{code.name} is no function")
    return made


def check(code: Code) -> Check:
    """Scores all samples in one call: `score(prompts, completions, **columns) -> numbers`."""
    made = function(code)
    wanted = _wanted(made)

    def scores(samples: list[Told]) -> list[float]:
        said = _arguments(samples)
        if wanted is not None:
            lacks = [name for name, needed in wanted.items() if needed and name not in said]
            if lacks:
                what = f"{code.name} asks for {lacks[0]}, which the rows have no column of"
                raise Unscored(what, f"give it a default; there is {', '.join(said)}")
            said = {name: value for name, value in said.items() if name in wanted}
        return _numbers(made(**said), len(samples), code.name)

    return Check(scores, together=True, bounded=False)


def _wanted(made: Callable[..., Any]) -> dict[str, bool] | None:
    """The names that a function takes, and whether it needs them; None where it takes all."""
    parameters = inspect.signature(made).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return None
    return {one.name: one.default is inspect.Parameter.empty for one in parameters}


def _arguments(samples: Sequence[Told]) -> dict[str, Any]:
    """Lists of one value a sample, by name; a column that only some rows have is None in the others."""
    columns = dict.fromkeys(name for one in samples for name in one["row"])
    said = {name: [one["row"].get(name) for one in samples] for name in columns}
    return said | {name: [one[name] for one in samples] for name in OURS}


def _numbers(given: Any, count: int, name: str) -> list[float]:
    """
    Raises:
        Unscored: they are no numbers, or not as many as there are samples.
    """
    fix = "return a list of one number for each completion"
    try:
        made = list(given)
    except TypeError as cause:
        raise Unscored(f"{name} gave {type(given).__name__}, no list of numbers", fix) from cause
    if len(made) != count:
        raise Unscored(f"{name} gave {len(made)} scores for {count} completions", fix)
    for at, one in enumerate(made):
        if one is None or isinstance(one, str | bytes | complex):
            raise Unscored(f"{name} gave {one!r:.40} for completion {at}, no number", fix)
    return [_number(one, at, name, fix) for at, one in enumerate(made)]


def _number(one: Any, at: int, name: str, fix: str) -> float:
    try:
        return float(one)
    except OverflowError as cause:
        raise Unscored(f"{name} gave too large a number for completion {at}", fix) from cause
    except (TypeError, ValueError) as cause:
        raise Unscored(f"{name} gave {type(one).__name__} for completion {at}, no number", fix) from cause
