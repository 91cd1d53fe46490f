"""Thoughts before an answer: where a template takes them, and where in its text they stand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from llmkit.data.messages import THOUGHTS

TAGS = re.compile(r"</?think>")
BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
"""Only ever matched at the beginning of a text."""
Message = Mapping[str, Any]


@lru_cache(8)
def field_of(template: str) -> str:
    """The name under which a template reads the thought of a message, or nothing."""
    return next((name for name in THOUGHTS if re.search(rf"\.{name}\b|['\"]{name}['\"]", template)), "")


def placed(message: Message, field: str) -> Message:
    """The message with its thought where the template reads it; in a `<think>` block of its content if nowhere."""
    if not message.get("reasoning_content") or field == "reasoning_content":
        return message
    thought, rest = message["reasoning_content"], {k: v for k, v in message.items() if k != "reasoning_content"}
    if field:
        return {**rest, field: thought}
    return {**rest, "content": f"<think>\n{thought.strip()}\n</think>\n\n{message.get('content') or ''}"}


def thought_of(message: Message) -> str:
    """What is thought in a message that a template is given."""
    for name in THOUGHTS:
        if message.get(name):
            return str(message[name]).strip()
    match = BLOCK.match(str(message.get("content") or "").lstrip())
    return match[1].strip() if match else ""


def blocks(text: str, start: int, end: int, thought: str) -> list[tuple[int, int]]:
    """Where thoughts stand between two places of a text: `<think>` blocks, and `thought` within other signs."""
    found: list[tuple[int, int]] = []
    at = text.find("<think>", start, end)
    while at >= 0 and (close := text.find("</think>", at, end)) >= 0:  # no pattern, whose time would have no bound
        stop = close + len("</think>")
        while stop < end and text[stop].isspace():
            stop += 1
        found.append((at, stop))
        at = text.find("<think>", stop, end)
    if thought and not found and (at := text.find(thought, start, end)) >= 0:
        found = [(at, at + len(thought))]
    return found


Layer = tuple[int, int, float]


def layered(layers: Sequence[Layer]) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Spans and their weights, where a later layer lies over an earlier one; what weighs nothing is left out."""
    top = np.full(max((end for _, end, _ in layers), default=0), -1)
    for index, (start, end, _) in enumerate(layers):
        top[start:end] = index
    cuts = [0, *(np.flatnonzero(np.diff(top)) + 1).tolist(), len(top)] if len(top) else []
    runs = [(low, high, int(top[low])) for low, high in itertools.pairwise(cuts)]
    kept = [(low, high, layers[index][2]) for low, high, index in runs if index >= 0 and layers[index][2] > 0]
    return tuple((low, high) for low, high, _ in kept), tuple(weight for *_, weight in kept)
