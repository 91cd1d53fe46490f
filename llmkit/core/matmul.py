"""Matrix products with a weight, by the fastest exact row that this build of torch has.

On x86 CPUs in fp32, oneDNN's linear is about a tenth faster than the BLAS that `@` calls (benchmarks/LOG.md); it takes
the transposed weight as a view, so that the input gradient needs no copy. Everything else goes through `@`, which also
defines the meaning.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor


@cache
def _onednn() -> Any | None:
    """oneDNN's linear, where torch was built with it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)


def row() -> str:
    """Which row is live, for `llmkit doctor`."""
    return "oneDNN linear (fp32 on CPU)" if _onednn() is not None else "torch matmul"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in), weight (out, in) -> x weight' + bias (N, out)."""
    fast = _onednn() if _suits(x, weight) else None
    if fast is None:
        return torch.nn.functional.linear(x, weight, bias)
    return cast(Tensor, fast(x, weight, bias, "none", [], ""))


def through(grad: Tensor, weight: Tensor) -> Tensor:
    """grad (N, out), weight (out, in) -> grad weight (N, in): the gradient of the input."""
    fast = _onednn() if _suits(grad, weight) else None
    return grad @ weight if fast is None else cast(Tensor, fast(grad, weight.t(), None, "none", [], ""))


def _suits(x: Tensor, weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, torch.nn.Parameter)
    return plain and len(x) > 0 and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
