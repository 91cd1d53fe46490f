"""The recipe's `adapter` node."""

from __future__ import annotations

from typing import Annotated, Literal

from llmkit.core.config import Later, config, setting


@config
class NoAdapter:
    """Every weight is trained."""

    kind: Literal["none"] = "none"


@config
class Lora:
    """Low-rank updates beside frozen linears (LoRA, arXiv:2106.09685), through peft and saved in its format."""

    kind: Literal["lora"] = "lora"
    rank: int = setting(16, least=1)
    alpha: float = setting(32.0, above=0.0)
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: float = setting(0.0, least=0.0, below=1.0)
    targets: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    """`all-linear` (all but the head), a regular expression over module paths, or a list of name endings."""
    dora: bool = False
    """Learn magnitudes apart from directions (DoRA, arXiv:2402.09353)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    init: Annotated[Literal["default"], Later(("pissa", "loftq", "olora", "eva"))] = "default"


Adapter = Annotated[
    NoAdapter | Lora,
    Later(("ia3", "vera", "oft", "boft", "prompt_tuning", "prefix_tuning", "p_tuning", "bottleneck")),
]
