"""Whether two models have the same tokens, so that one can be told what the other says of them."""

from __future__ import annotations

from typing import Any


def other_words(ours: Any, its: Any) -> str:
    """How the tokens of two tokenizers differ, if they do."""
    mine, other = ours.get_vocab(), its.get_vocab()
    if len(mine) != len(other):
        return f"{len(other)} tokens, not {len(mine)}"
    wrong = next((word for word, id in mine.items() if other.get(word) != id), None)
    return "" if wrong is None else f"{wrong!r} is {other.get(wrong)}, not {mine[wrong]}"
