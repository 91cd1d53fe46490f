"""Which row of each operation is live on this machine."""

from __future__ import annotations

from llmkit_kernels.build import lacks

OPERATIONS = ("attention", "draw", "gated", "layer", "linear", "memory", "norm", "paged")


def rows() -> dict[str, str]:
    """Operation -> its live row, with the reason where the compiled one is not."""
    return {name: f"plain: {why}" if (why := lacks(name)) else "compiled for this CPU" for name in OPERATIONS}
