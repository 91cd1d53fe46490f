"""What kinds of attention need of a machine."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from inspect import signature


def missing(kind: str, cuda: bool) -> str:
    """What a machine, with or without a CUDA device, has not that `flash` or `flex` needs; of other kinds nothing."""
    if kind not in ("flash", "flex"):
        return ""
    if not cuda:
        return "needs a CUDA device"
    return "needs the package flash-attn, or torch>=2.11" if kind == "flash" and not (outside() or _inside()) else ""


def outside() -> bool:
    """Whether the package flash-attn is installed."""
    return find_spec("flash_attn") is not None


@cache
def _inside() -> bool:
    """Whether torch itself has flash attention over pieces of unequal length, with windows."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention import varlen

    return "window_size" in signature(varlen.varlen_attn).parameters
