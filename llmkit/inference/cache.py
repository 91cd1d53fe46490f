"""What an operator says of the cache of keys and values."""

from __future__ import annotations

from typing import Literal

from llmkit.core.config import Size, config, setting

ON_CPU = 2 << 30
"""Bytes that a cache takes on a CPU where nobody says how many."""


@config
class Cache:
    """Where the engine keeps keys and values: blocks of tokens, all of one size, taken when it starts."""

    memory: float = setting(default=0.9, above=0.0, most=1.0)
    """The share that it takes of a GPU's memory that is free once the model is loaded. On a CPU it takes 2 GiB, or half
    of that share where less is free."""
    size: Size | None = setting(default=None, least=1)
    """Bytes instead: of each process, where several hold the model."""
    block: int = setting(default=16, least=1, most=256)
    """Tokens of a block: only whole ones are found again by other requests."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    """How keys and values are kept; auto: as the model computes them. int8 has a factor for each head of a token."""

    def budget(self, device: str, free: int, ranks: int = 1) -> int:
        """Bytes of each of `ranks` processes that hold the model, where so many are free; those on a CPU share it."""
        if self.size is not None:
            return self.size
        share = int(free * self.memory)
        return share if device == "cuda" else min(ON_CPU, share // 2) // ranks
