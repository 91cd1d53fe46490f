"""Whether an answer is made of sections: `<think>...</think><answer>...</answer>`. In one pass, whatever it holds."""

from __future__ import annotations

from collections.abc import Sequence


def sections(text: str, tags: Sequence[str], rest: bool, begun: bool = False) -> float:
    """1 where each tag is opened and closed once, in this order, not within another; `rest`: more text may follow the
    last one; `begun`: the first was opened by the prompt."""
    left = f"<{tags[0]}>{text}" if begun else text
    for tag in tags:
        inner, end, behind = left.lstrip().removeprefix(f"<{tag}>").partition(f"</{tag}>")
        if not left.lstrip().startswith(f"<{tag}>") or not end or _marked(inner, tags):
            return 0.0
        left = behind
    return float(not _marked(left, tags) and (rest or not left.strip()))


def _marked(text: str, tags: Sequence[str]) -> bool:
    return any(f"<{tag}>" in text or f"</{tag}>" in text for tag in tags)
