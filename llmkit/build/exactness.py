"""Whether what a model writes depends on what is made beside it: said by `llmkit doctor`, manifests and the server."""

from __future__ import annotations

from typing import Any

import torch
from llmkit_kernels.build import lacks

from llmkit.inference.node import Generator, OwnEngine
from llmkit.models.serving import lacks_order

YES = "yes"


def exactness(model: Any, generator: Generator, mixed: bool = False) -> str:
    """Of the texts that `generator` makes of a loaded model: `yes`, or `no` and why. `mixed`: its products run in 16
    bits by autocast."""
    if not isinstance(generator, OwnEngine):
        return f"not known: made by {generator.kind}"
    why = "products run in 16 bits" if mixed else lacks_order(model, generator.exact)
    if generator.tensor > 1:
        why = f"{generator.tensor} processes add up in an order of their own"
    return f"no: {why}" if why else YES


def exactness_here() -> str:
    """What this machine has: for which models a request's logits are the same to the bit whatever is beside it."""
    missing = [f"{name}: {why}" for name in ("linear", "paged") if (why := lacks(name))]
    on_cpu = f"with exact: true, at a cost ({'; '.join(missing)})" if missing else "always"
    on_gpu = "; on the GPU with exact: true, at a cost" if torch.cuda.is_available() else ""
    return f"fp32 on the CPU {on_cpu}{on_gpu}"
