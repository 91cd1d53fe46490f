"""Gradients of several ranks, summed: small ones travel together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 25 << 20
"""Bytes of small tensors that are summed in one message at most."""


def buckets(tensors: Sequence[Tensor], most: int = BUCKET) -> Iterator[list[Tensor]]:
    """Tensors of one type, `most` bytes of them together; a larger one is alone."""
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
        made, size = list[Tensor](), 0
        for tensor in (one for one in tensors if one.dtype == kind):
            if made and size + tensor.nbytes > most:
                yield made
                made, size = [], 0
            made.append(tensor)
            size += tensor.nbytes
        yield made


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All their numbers in one row, copied."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def put_back(row: Tensor, tensors: Sequence[Tensor]) -> None:
    """The numbers of a row into the tensors that it was made of."""
    for tensor, part in zip(tensors, row.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def sum_over(tensors: Sequence[Tensor], group: Any) -> None:
    """Each is summed over the ranks of a group, in place; a large one, and small ones together, in one message."""
    for some in buckets(tensors):
        if len(some) == 1 and some[0].is_contiguous():
            dist.all_reduce(some[0], group=group)
            continue
        row = flat(some)
        dist.all_reduce(row, group=group)
        put_back(row, some)


def gradients(params: Iterable[nn.Parameter]) -> list[Tensor]:
    """Those of all parameters; one that a rank has not is zeros, so that all ranks sum alike."""
    found = []
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        found.append(p.grad)
    return found
