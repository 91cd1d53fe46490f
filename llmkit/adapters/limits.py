"""What a method cannot be together with, each with its reason; nothing where it can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Limits(NamedTuple):
    """Why a method does not go with packed rows, with recompute, or into its base."""

    packing: str = ""
    recompute: str = ""
    merge: str = ""


TOKENS = "virtual tokens change what the model reads, and no weight of it"
PREFIX = "a prefix adds keys and values, and changes no weight of the model"
BLOCKS = "a bottleneck block is not linear, so no weight of the model can hold it"
UNMERGEABLE: Mapping[str, str] = {
    "PROMPT_TUNING": TOKENS,
    "P_TUNING": TOKENS,
    "PREFIX_TUNING": PREFIX,
    "LLMKIT_BOTTLENECK": BLOCKS,
}
"""Why an adapter cannot be folded into its base, by the `peft_type` of its folder."""


def virtual_tokens(adapter: Any) -> int:
    """Tokens that a method puts before every row: they count in the context and in memory."""
    return int(getattr(adapter, "virtual_tokens", 0))
