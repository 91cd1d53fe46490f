"""What kinds of attention need of a machine."""

from __future__ import annotations

from importlib.util import find_spec


def missing(kind: str, cuda: bool) -> str:
    """What a machine, with or without a CUDA device, has not that `flash` or `flex` needs; of other kinds nothing."""
    if kind not in ("flash", "flex"):
        return ""
    if not cuda:
        return "needs a CUDA device"
    return "needs the package flash-attn" if kind == "flash" and find_spec("flash_attn") is None else ""
