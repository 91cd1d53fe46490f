"""What the stages of a pipeline send each other: hidden states ahead, their gradients back."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
"""Types of what the last stage tells the others, by their number."""
DIMS = 6
"""Dimensions of it, at most."""


class Links:
    """One rank of the group that holds a model's stages, in their order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)
        self.index, self.count = dist.get_rank(group), len(self.ranks)
        self.back_group: Any = dist.new_group(self.ranks, use_local_synchronization=True)
        """Gradients have a group of their own: on a device, what goes one way would wait for what goes the other."""
        self._sent: dict[int, deque[tuple[Any, Tensor]]] = {1: deque(), -1: deque()}
        """What is on its way ahead and back, with the memory that it is sent from."""

    @property
    def first(self) -> bool:
        """Whether it begins with tokens."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it has the head."""
        return self.index == self.count - 1

    def ahead(self, hidden: Tensor) -> None:
        """Begins to send hidden states to the next stage."""
        self._send(hidden, 1, self.group)

    def back(self, grad: Tensor) -> None:
        """Begins to send a gradient to the stage before."""
        self._send(grad, -1, self.back_group)

    def from_before(self, room: Tensor) -> Tensor:
        """Hidden states of the stage before, in `room`."""
        return self._receive(room, -1, self.group)

    def from_next(self, room: Tensor) -> Tensor:
        """A gradient of the next stage, in `room`."""
        return self._receive(room, 1, self.back_group)

    def _send(self, tensor: Tensor, by: int, group: Any) -> None:
        held, sent = tensor.detach().contiguous(), self._sent[by]
        sent.append((dist.isend(held, self.ranks[self.index + by], group=group), held))
        while len(sent) > self.count:  # in 1F1B order, the neighbour has it
            sent.popleft()[0].wait()

    def _receive(self, room: Tensor, by: int, group: Any) -> Tensor:
        dist.recv(room, self.ranks[self.index + by], group=group)
        return room

    def settle(self) -> None:
        """All that was sent has come."""
        for sent in self._sent.values():
            while sent:
                sent.popleft()[0].wait()

    def told(self, value: Tensor | None, device: torch.device) -> Tensor:
        """What the last stage says, on all of them; the others give None."""
        head = torch.zeros(DIMS + 2, dtype=torch.int64, device=device)
        if value is not None:
            head[: value.dim() + 2] = torch.tensor([KINDS.index(value.dtype), value.dim(), *value.shape])
        source = self.ranks[-1]
        dist.broadcast(head, source, group=self.group)
        kind, dims, *shape = head.tolist()
        made = torch.empty(shape[:dims], dtype=KINDS[kind], device=device) if value is None else value.contiguous()
        dist.broadcast(made, source, group=self.group)
        return made
