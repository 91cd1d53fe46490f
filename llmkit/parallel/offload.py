"""Activations that wait for the backward pass in the host's memory.

What the forward keeps is copied to pinned memory on a stream of its own, while the device computes on; the backward
brings each tensor back when it asks for it. Weights stay where they are, and so do small tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

LEAST = 64 << 10
"""Bytes of the smallest tensor that is moved: a smaller one costs more in latency than it frees."""


class Host(Protocol):
    """Where tensors wait."""

    def take(self, tensor: Tensor) -> Any:
        """A copy in the host's memory."""
        ...

    def give(self, held: Any, device: torch.device) -> Tensor:
        """The tensor again, on its device."""
        ...


class Pinned:
    """Pinned host memory, reached by copies beside the computation."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def take(self, tensor: Tensor) -> Tensor:
        """A copy that is whole once the stream has come to it."""
        held = torch.empty_like(tensor, device="cpu", pin_memory=True, memory_format=torch.preserve_format)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            held.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is not given to another before the copy is done
        return held

    def give(self, held: Tensor, device: torch.device) -> Tensor:
        """The tensor, on which the computation waits for the copy; the host's memory is free after that."""
        now = torch.cuda.current_stream(device)
        with torch.cuda.stream(self.stream):
            back = held.to(device, non_blocking=True)
        now.wait_stream(self.stream)
        back.record_stream(now)
        return back


class Offload:
    """Hooks for what autograd saves; `weights` are never moved."""

    def __init__(self, weights: Iterable[Tensor], host: Host, least: int = LEAST) -> None:
        self.weights, self.host, self.least = tuple(weights), host, least
        self.moved = 0
        """Bytes that were moved so far."""

    def keeping(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Around a forward pass: what it keeps lies on the host."""
        stay = {p.untyped_storage().data_ptr() for p in self.weights if not isinstance(p, DTensor)}
        matrices = [p.shape for p in self.weights if p.dim() == 2]
        shapes = {*matrices, *(shape[::-1] for shape in matrices)}  # of the copies that autocast makes

        def pack(tensor: Tensor) -> tuple[bool, Any, torch.device]:
            size = tensor.numel() * tensor.element_size()
            if size < self.least or tensor.shape in shapes or tensor.untyped_storage().data_ptr() in stay:
                return False, tensor, tensor.device
            self.moved += size
            return True, self.host.take(tensor.detach()), tensor.device

        def unpack(packed: tuple[bool, Any, torch.device]) -> Tensor:
            away, held, device = packed
            back: Tensor = self.host.give(held, device) if away else held
            return back

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
