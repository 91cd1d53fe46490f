"""Tensors that lie on several ranks, made whole on the main one, tensor by tensor, in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmkit.core.sliced import Slice

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""The shape of a whole tensor, and where a block of it begins."""


def block(held: DTensor) -> Block:
    """Where this rank's part of a distributed tensor lies."""
    _, start = compute_local_shape_and_global_offset(held.shape, held.device_mesh, held.placements)
    return tuple(held.shape), tuple(start)


def local(held: DTensor) -> Tensor:
    """This rank's part of a distributed tensor, in the same memory."""
    part: Tensor = cast(Any, held.detach()).to_local()
    return part


def collected(parts: Mapping[str, Tensor | Slice], peers: Any) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by name, one at a time, on the main rank; on the others nothing. Every rank takes part, with the
    same names in the same order."""
    ranks, cut = peers.ranks, {name: part for name, part in parts.items() if isinstance(part, Slice)}
    places = peers.gather({name: [part.start, tuple(part.tensor.shape)] for name, part in cut.items()})
    for name, part in parts.items():
        if not isinstance(part, Slice):
            if ranks.main:
                yield name, part
            continue
        owners: dict[tuple[int, ...], int] = {}
        for rank, said in enumerate(places):
            if all(said[name][1]):  # of copies the first; nothing of an empty block
                owners.setdefault(tuple(said[name][0]), rank)
        if ranks.main:
            yield name, _received(part, owners, [said[name][1] for said in places], peers.host)
        elif ranks.rank in owners.values():
            dist.send(part.tensor.detach().cpu().contiguous(), 0, group=peers.host)


def _received(part: Slice, owners: Mapping[tuple[int, ...], int], shapes: list[list[int]], host: Any) -> Tensor:
    """A tensor of this rank's block and those that the owners of the others send, in the order of ranks."""
    made = torch.empty(part.shape, dtype=part.tensor.dtype)
    for start, rank in owners.items():
        here = part.tensor.detach().cpu()
        if rank:
            here = torch.empty(shapes[rank], dtype=part.tensor.dtype)
            dist.recv(here, rank, group=host)
        made[tuple(slice(a, a + n) for a, n in zip(start, here.shape, strict=True))] = here
    return made


def make_whole(model: nn.Module, peers: Any) -> None:
    """Puts whole tensors in the place of a model's distributed parameters on the main rank, in the host's memory: all
    of a model's, and of an adapter those that are trained. Every rank takes part; nothing runs the model after it."""
    adapted = hasattr(model, "peft_config")
    held = {
        name: p for name, p in model.named_parameters() if isinstance(p, DTensor) and (p.requires_grad or not adapted)
    }
    parts = {name: Slice(local(p), *block(p)) for name, p in held.items()}
    for name, tensor in collected(parts, peers):
        put(model, held[name], tensor)


def put(model: nn.Module, old: Any, value: Tensor) -> None:
    """Gives a parameter or buffer another value, wherever it is: tied weights stay tied."""
    if not isinstance(old, DTensor):
        old.data = value
        return
    new = nn.Parameter(value, old.requires_grad)
    for module in model.modules():
        for name in [name for name, p in module.named_parameters(recurse=False, remove_duplicate=False) if p is old]:
            setattr(module, name, new)
