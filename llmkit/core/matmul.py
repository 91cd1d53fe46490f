"""Matrix products with a weight, by the fastest exact row that this build of torch has.

In fp32 on an AMD CPU, oneDNN's linear is about a tenth faster than MKL, the BLAS that `@` calls, and on an Intel CPU
about a tenth slower (benchmarks/LOG.md); it takes the transposed weight as a view, so that the input gradient needs no
copy. Its products with whole weights are up to a tenth faster where 8 divides the rows. Everything else goes through
`@`, which also defines the meaning.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

GRAIN, LEAST = 8, 256
"""Rows of one product are made a multiple of the first, from so many on that it costs no more than a fortieth."""


@cache
def _onednn() -> Any | None:
    """oneDNN's linear, where torch was built with it and has nothing better."""
    if not torch.backends.mkldnn.is_available() or (torch.backends.mkl.is_available() and _intel()):
        return None
    return getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)


def _intel() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as info:
            return any("GenuineIntel" in line for line in info)
    except OSError:
        return False


def row() -> str:
    """Which row is live, for `llmkit doctor`."""
    return "oneDNN linear (fp32 on CPU)" if _onednn() is not None else "torch matmul"


def lacking(rows: Tensor) -> int:
    """How many more rows (N, ...) would make products with them faster."""
    fits = rows.device.type == "cpu" and len(rows) >= LEAST and _onednn() is not None
    return -len(rows) % GRAIN if fits else 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in), weight (out, in) -> x weight' + bias (N, out)."""
    fast = _onednn() if _suits(x, weight) else None
    if fast is None:
        return torch.nn.functional.linear(x, weight, bias)
    return cast(Tensor, fast(x, weight, bias, "none", [], ""))


def through(grad: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
    """grad (N, out), weight (out, in) -> grad weight (N, in): the gradient of the input, added to `total` in place."""
    fast = _onednn() if _suits(grad, weight) else None
    if fast is None:
        return grad @ weight if total is None else total.addmm_(grad, weight)
    made = cast(Tensor, fast(grad, weight.t(), None, "none", [], ""))
    return made if total is None else total.add_(made)


def _suits(x: Tensor, weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, torch.nn.Parameter)
    return plain and len(x) > 0 and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
