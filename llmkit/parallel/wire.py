"""What a model's ranks send each other while they serve: values from the first to all, tensors to and from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from llmkit.parallel.group import Group


class Wire:
    """Over all ranks of a group."""

    def __init__(self, group: Group) -> None:
        self.group = group

    @property
    def first(self) -> bool:
        """Whether this is the one that the others follow."""
        return self.group.ranks.main

    def tell(self, value: Any) -> Any:
        """The first rank's JSON value."""
        return self.group.tell(value)

    def spread(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, in the place of those of the others, of one shape."""
        dist.broadcast(tensor, 0)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Those of all ranks, in their order, of one shape but for the last dimension."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(self.group.ranks.world)]
        dist.all_gather(sizes, torch.tensor([tensor.shape[-1]], device=tensor.device))
        widths = [int(size) for size in sizes]
        room = functional.pad(tensor, (0, max(widths) - tensor.shape[-1])).contiguous()
        made = [torch.empty_like(room) for _ in widths]
        dist.all_gather(made, room)
        return [part[..., :width] for part, width in zip(made, widths, strict=True)]

    def any(self, why: str) -> str:
        """The first reason that a rank gives, or nothing."""
        return self.group.any(why)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Around collectives of tensors: who does not go on is named."""
        with self.group.naming():
            yield
