"""Rows of preference data: which keys make one, and the completions that it offers to one prompt.

The formats are TRL's: `chosen` and `rejected` with or without a `prompt`, or `prompt`, `completion` and `label`; each
as text or as messages. Transcripts in one text (hh-rlhf) are read as the conversations that they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.data.dialects import TURN, transcript
from llmkit.data.messages import ROLES, messages, text
from llmkit.data.rows import Row, Unusable, is_number
from llmkit.data.shapes import shaped, tools_of

READ = ("prompt", "chosen", "rejected", "completion", "label")
"""The columns that a row may be made of."""
SAME = "chosen equals rejected"
DOUBT = "doubt"
"""What `per` calls 1 - `probability`, the chance that the chosen completion is the worse one."""


@dataclass(frozen=True)
class Offered:
    """The completions of a prompt, each as the row of supervised training that it would be."""

    rows: tuple[Row, ...]
    per: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Figures of each."""
    joint: bool = False
    """Whether the row does not say where its prompt ends: it is what the texts have in common."""


def offered(values: Mapping[str, Any], id: int) -> Offered:
    """A row in one of the formats of preferences; of two completions the chosen one comes first.

    Raises:
        Unusable: with the reason.
    """
    nulls = [name for name in READ if name in values and values[name] is None]
    values = {name: value for name, value in values.items() if value is not None}
    if nulls:
        raise Unusable(f"{nulls[0]} is null")
    if "chosen" in values and "rejected" in values:
        return _pair(values, id)
    if "completion" in values and "label" in values:
        row = shaped({name: value for name, value in values.items() if name not in ("messages", "text")}, id)
        return Offered((row,), {"label": (_label(values["label"]),)})
    raise Unusable("no chosen and rejected, or prompt, completion and label")


def _label(given: Any) -> float:
    if given in (True, False):  # and 1 and 0
        return float(given)
    raise Unusable("label is not true or false")


def _pair(values: Mapping[str, Any], id: int) -> Offered:
    cluster, tools = str(values.get("cluster", id)), tools_of(values.get("tools"))
    per = {"label": (1.0, 0.0)} | _margin(values.get("margin")) | _doubt(values.get("probability"))
    prompt, sides = values.get("prompt"), (values["chosen"], values["rejected"])
    if sides[0] == sides[1]:
        raise Unusable(SAME)
    if prompt is None and all(isinstance(side, str) and TURN.match(side) for side in sides):
        sides = transcript(sides[0]), transcript(sides[1])
    if all(isinstance(side, list) for side in sides):
        begin, ends = _parted(prompt, sides)
    elif not all(isinstance(side, str) for side in sides):
        raise Unusable("chosen and rejected are neither both text nor both messages")
    elif isinstance(prompt, list):
        begin, ends = prompt, [[{"role": "assistant", "content": side}] for side in sides]
    else:
        said = "" if prompt is None else text(prompt, "prompt")
        named = zip(("chosen", "rejected"), sides, strict=True)
        rows = tuple(Row(id, cluster, prompt=said, completion=text(side, name), tools=tools) for name, side in named)
        return Offered(rows, per, joint=prompt is None)
    made = [messages([*begin, *end], len(begin)) for end in ends]
    return Offered(tuple(Row(id, cluster, said, len(begin), tools=tools, weights=w) for said, w in made), per)


def _parted(prompt: Any, sides: Sequence[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """A conversation's prompt, and how each side goes on: what both begin with is the prompt where none is said."""
    if isinstance(prompt, list):
        return prompt, list(sides)
    if not all(sides):
        raise Unusable(f"{'rejected' if sides[0] else 'chosen'} holds no messages")
    if isinstance(prompt, str) and all(_answers(side[0]) for side in sides):
        return [{"role": "user", "content": text(prompt, "prompt")}], list(sides)
    shared = zip(*sides, strict=False)
    size = next((at for at, (one, other) in enumerate(shared) if one != other), min(map(len, sides)))
    size = min(size, *(len(side) - 1 for side in sides))  # each has something of its own
    return sides[0][:size], [side[size:] for side in sides]


def _answers(message: Any) -> bool:
    role = message.get("role") if isinstance(message, dict) else None
    return isinstance(role, str) and ROLES.get(role) == "assistant"


def _doubt(given: Any) -> dict[str, tuple[float, ...]]:
    """How likely the label is the wrong way round, where the row says how likely it is right; 0 in rows that do not."""
    if given is None:
        return {}
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise Unusable("probability is not a number from 0 to 1")
    return {DOUBT: (1 - given, 1 - given)}


def _margin(given: Any) -> dict[str, tuple[float, ...]]:
    """By how much the chosen one is better, where the row says it."""
    if given is None:
        return {}
    if not is_number(given):
        raise Unusable("margin is not a number")
    return {"margin": (float(given), float(given))}
