"""The formats of rows for supervised training: which keys make one, and what it must hold to be trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmkit.data.dialects import alpaca, sharegpt, transcript
from llmkit.data.messages import messages, text
from llmkit.data.rows import DEEPEST, Row, Unusable, measured

READ = ("messages", "prompt", "completion", "text", "instruction", "output", "conversations", "transcript")
"""The columns that a row may be made of."""


def shaped(values: Mapping[str, Any], id: int) -> Row:
    """A row in one of the known formats: messages, prompt and completion, text, Alpaca's, ShareGPT's or a transcript.

    Raises:
        Unusable: with the reason.
    """
    nulls = [name for name in READ if name in values and values[name] is None]
    values = {name: value for name, value in values.items() if value is not None}  # how tables say: no such column
    cluster, tools = str(values.get("cluster", id)), tools_of(values.get("tools"))

    def conversation(given: Any, learn_from: int = 0) -> Row:
        said, weights = messages(given, learn_from)
        return Row(id, cluster, said, learn_from, tools=tools, weights=weights)

    if "messages" in values:
        return conversation(values["messages"])
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation([*prompt, *completion], len(prompt))
    if "completion" in values:
        return Row(id, cluster, prompt=text(prompt, "prompt"), completion=text(completion, "completion"))
    if "text" in values:
        return Row(id, cluster, completion=text(values["text"], "text"))
    if "instruction" in values and "output" in values:
        return conversation(alpaca(values))
    if "conversations" in values:
        return conversation(sharegpt(values))
    if "transcript" in values:
        return conversation(transcript(values["transcript"]))
    raise Unusable(f"{nulls[0]} is null" if nulls else "no messages, prompt and completion, or text")


def tools_of(given: Any) -> tuple[Any, ...]:
    """The tools that a row brings, as templates expect them.

    Raises:
        Unusable: they are none.
    """
    if isinstance(given, str):  # parquet holds no list of unlike objects, so that data sets keep them as JSON text
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as cause:
            raise Unusable("tools is text and not JSON") from cause
        if measured(given)[1] > DEEPEST:
            raise Unusable(f"tools nests more than {DEEPEST} deep")
    if given is not None and not (isinstance(given, list) and all(isinstance(tool, dict) for tool in given)):
        raise Unusable("tools is not a list of objects")
    # a bare signature is what templates expect inside of `function`
    return tuple(tool if "function" in tool or "name" not in tool else _function(tool) for tool in given or ())


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
