"""Where each rank's part of a parameter, its gradient and its optimizer's state lies in DeepSpeed's flat buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.core.sliced import Slice, whole
from llmkit.parallel.optimizers import named, put
from llmkit.parallel.team import squares

BOTH = {3: ("fp16_groups", "fp32_partitioned_groups_flat")}
"""Where an optimizer of a stage holds its groups of parameters, and the buffer of each group."""
FIRST = ("bit16_groups", "single_partition_of_fp32_groups")


class Shards:
    """The parts of one rank. A method that gathers is called by every rank alike."""

    def __init__(self, engine: Any, params: Mapping[str, nn.Parameter]) -> None:
        self.engine, self.held = engine, engine.optimizer
        self.group = engine.data_parallel_group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.stage = int(engine.zero_optimization_stage())
        names = {id(p): name for name, p in params.items()}
        groups, flats = (getattr(self.held, name) for name in BOTH.get(self.stage, FIRST))
        self.members = [[(names[id(p)], p) for p in group] for group in groups]
        self.flats: list[Tensor] = list(flats)
        offload = engine.zero_offload_optimizer()
        self.flat = {id(p): flat for flat, p in self.pairs()}
        self.away = "none" if offload is None else str(getattr(offload.device, "value", offload.device))
        """Where the optimizer's state is."""

    def squares(self) -> Tensor:
        """The sum of the squares of all gradients, over all ranks: fp64."""
        if self.away != "none":
            found = [torch.as_tensor(norm).double().square() for norm in self.held.norm_for_param_grads.values()]
        else:
            found = [squares(grad) for grads in self.held.averaged_gradients.values() for grad in grads or ()]
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for one in found:
            total += one.to(total.device)
        dist.all_reduce(total, group=self.group)
        return total

    def forget(self) -> None:
        """Nothing is left of the gradients, whether they were applied or not."""
        self.held.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.held.averaged_gradients.clear()
            self.held.grad_partitions_flat_buffer.zero_()  # who gets none in the next step would keep these
        else:
            for key in self.held.averaged_gradients:
                self.held.averaged_gradients[key] = None
                self.held.all_grad_tensors[key] = None
            self.held.micro_step_id = -1
        if self.away != "none":
            self.held.reset_cpu_buffers()
        for flat in self.flats if self.away == "cpu" else ():
            if flat.grad is not None:
                flat.grad.zero_()

    def pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """Each parameter, with the buffer that a part of it lies in."""
        for flat, members in zip(self.flats, self.members, strict=True):
            yield from ((flat, p) for _, p in members)

    def state(self) -> Iterator[tuple[str, Tensor | Slice]]:
        """What a checkpoint holds by name, one tensor at a time: whole on one rank, and empty on the others; the ranks
        take turns."""
        turns = cycle(range(self.world))
        for flat, members in zip(self.flats, self.members, strict=True):
            kept = self.held.state.get(flat, {})
            for name, p in members:
                yield f"param/{name}", self.whole(p, flat, None, next(turns))
                for key, value in kept.items():
                    if cut(value, flat):
                        yield f"optim/{name}/{key}", self.whole(p, flat, key, next(turns))
                    else:
                        yield from ((f"optim/{said}", number) for said, number in named(name, {key: value}).items())

    def whole(self, p: nn.Parameter, flat: Tensor, key: str | None, owner: int = 0) -> Tensor | Slice:
        """A parameter, or what the optimizer keeps of it under `key`, in the host's memory of rank `owner`."""
        shape = tuple(getattr(p, "ds_shape", p.shape))
        piece, start = self._own(p, flat, key)
        made = torch.zeros(math.prod(shape), dtype=piece.dtype, device=self.engine.device)
        made[start : start + len(piece)] = piece
        dist.reduce(made, dist.get_global_rank(self.group, owner), group=self.group)
        if self.rank == owner:
            return made.view(shape).cpu()
        return Slice(torch.empty((0,) * len(shape), dtype=piece.dtype), shape, (0,) * len(shape))

    def lying(self, p: Any) -> tuple[Slice]:
        """What this rank holds of a parameter: all of it, or in stage 3 a stretch of it laid flat, in its own type."""
        if self.stage < 3:
            return (whole(p.detach()),)
        part, start = self._own(p, self.flat[id(p)], None)
        return (Slice(part.to(p.dtype), (p.ds_numel,), (start,)),)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave, from whole tensors."""
        for flat, members in zip(self.flats, self.members, strict=True):
            for name, p in members:
                self._fill(p, flat, None, tensors[f"param/{name}"])
            self._load_state(flat, members, tensors)
        if self.stage < 3:
            self.held.update_lp_params()

    def _load_state(self, flat: Tensor, members: list[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]) -> None:
        name, p = members[0]
        prefix = f"optim/{name}/"
        self.held.state.pop(flat, None)
        kept: dict[str, Any] = {}
        for rest in [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]:
            value = tensors[prefix + rest]
            if tuple(value.shape) == tuple(getattr(p, "ds_shape", p.shape)):
                kept[rest] = torch.zeros_like(flat, requires_grad=False)
            else:
                kept[rest.partition(":")[0]] = put(self.engine.basic_optimizer, rest, value, flat)
        if not kept:
            return
        self.held.state[flat] = kept
        for key, value in kept.items():
            for name, p in members if cut(value, flat) else ():
                self._fill(p, flat, key, tensors[f"optim/{name}/{key}"])

    def _own(self, p: Any, flat: Tensor, key: str | None) -> tuple[Tensor, int]:
        """This rank's part of a parameter, flat, and where in the parameter it begins."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            part = safe_get_local_fp32_param(p) if key is None else safe_get_local_optimizer_state(p, key)
            start = min(self.rank * len(part), p.ds_numel)
            return part.detach()[: p.ds_numel - start], start
        source = flat if key is None else self.held.state[flat][key]
        if (lies := p._hp_mapping) is None:
            return source.detach()[:0], 0
        at, place = lies.hp_fragment_address, lies.lp_fragment_address
        return source.detach()[at.start : at.start + at.numel], place.start

    def _fill(self, p: Any, flat: Tensor, key: str | None, whole: Tensor) -> None:
        """Puts this rank's part of a whole tensor where it lies."""
        values = whole.reshape(-1)
        if self.stage == 3:
            import deepspeed
            from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

            size = p.ds_tensor.ds_numel
            part = torch.zeros(size, dtype=flat.dtype)
            mine = values[self.rank * size : (self.rank + 1) * size]
            part[: len(mine)] = mine
            if key is not None:
                safe_set_local_optimizer_state(p, part, key)
                return
            with torch.no_grad(), deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.data.copy_(whole)
            safe_set_local_fp32_param(p, part)
        elif (lies := p._hp_mapping) is not None:
            target = flat if key is None else self.held.state[flat][key]
            at, place = lies.hp_fragment_address, lies.lp_fragment_address
            target.detach()[at.start : at.start + at.numel] = values[place.start : place.start + place.numel]


def cut(value: Any, flat: Tensor) -> bool:
    """Whether a state is of a flat buffer's shape, so that each rank has a part of it."""
    return isinstance(value, Tensor) and value.shape == flat.shape
