"""Rows of other tools as messages: Alpaca's, ShareGPT's, and transcripts in one text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llmkit.data.messages import ROLES, calls, text
from llmkit.data.rows import Unusable

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|User|Assistant|AI|System):[ \t]*")
"""Where a turn of a transcript begins."""
SPEAKERS = {"Human": "user", "User": "user", "Assistant": "assistant", "AI": "assistant", "System": "system"}


def alpaca(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`instruction`, `input`, `output`, and what LLaMA-Factory adds: `system`, and `history` as pairs of texts."""
    given = values.get("input") or ""
    asked = text(values["instruction"], "instruction") + (f"\n\n{text(given, 'input')}" if given else "")
    made = _system(values)
    for pair in values.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable("history is not a list of pairs")
        made += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = text(values["output"], "output")
    return [*made, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def sharegpt(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`conversations` of `from` and `value`; a `function_call` is an answer that calls tools."""
    given = values["conversations"]
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise Unusable("conversations is not a list of turns")
    if given and all("role" in turn and "from" not in turn for turn in given):
        return [*_system(values), *given]
    unknown = [turn.get("from") for turn in given if str(turn.get("from")) not in ROLES]
    if unknown:
        raise Unusable(f"a turn is from {str(unknown[0])[:20]!r}")
    return [*_system(values), *map(_turn, given)]


def transcript(given: Any) -> list[dict[str, Any]]:
    """A conversation in one text, as `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    said = text(given, "transcript")
    begins = list(TURN.finditer(said))
    if not begins or begins[0].start():
        raise Unusable("transcript does not begin with who speaks")
    ends = [match.start() for match in begins[1:]] + [len(said)]
    return [
        {"role": SPEAKERS[match[1]], "content": said[match.end() : end].strip()}
        for match, end in zip(begins, ends, strict=True)
    ]


def _system(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    said = values.get("system")
    return [{"role": "system", "content": said}] if said else []


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    said, kept = turn.get("value"), {k: turn[k] for k in ("weight", "train", "train_detail") if k in turn}
    if turn["from"] != "function_call":
        return {"role": turn["from"], "content": said, **kept}
    try:
        made = json.loads(said) if isinstance(said, str) else said
    except (ValueError, RecursionError) as cause:
        raise Unusable("function_call is not JSON") from cause
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": calls(made if isinstance(made, list) else [made]),
        **kept,
    }
