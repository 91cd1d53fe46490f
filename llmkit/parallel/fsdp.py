"""Parameters, gradients and optimizer state cut over ranks (torch's `fully_shard`, FSDP2; arXiv:2304.11277).

Each layer is a group that is gathered while it runs and given up after it; what is outside of the layers (embeddings,
the last norm, the head) is gathered around the forward of the scored module. Every rank holds a block of dim 0 of each
parameter. The optimizer sees these blocks as plain tensors: that is exact for one whose update of a number depends on
that number's gradient alone, and the others are refused by name (`stages/levers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from math import hypot
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from llmkit.core.deferred import Deferred
from llmkit.core.errors import ModelError
from llmkit.core.peers import Peers
from llmkit.core.sliced import Slice, whole
from llmkit.parallel.collect import block, local, make_whole
from llmkit.parallel.grid import Grid
from llmkit.parallel.node import Fsdp
from llmkit.parallel.offload import Offload
from llmkit.parallel.steps import Parts, Steps
from llmkit.parallel.sums import gradients, sum_over
from llmkit.parallel.team import Sums, norm, summed

FORWARDS = ("inside", "likeliest")
"""Methods of the scored module that read weights, beside its forward."""
OTHER = "use parallel.strategy=ddp"
SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name until torch 2.12


class Reducing:
    """The sums of gradients, told to those who watch before each begins (torch's interface `ReduceScatter`)."""

    def __init__(self, phase: Callable[[str], None]) -> None:
        self.phase = phase

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for a message."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """This rank's block of a layer's sum."""
        self.phase("reduce")
        return SCATTER(output_tensor, input_tensor, op, group, async_op)


class Again:
    """A layer that runs the frozen weights of another one, which is cut: they are gathered for its passes too.

    The other one's own hooks see to its passes alone. Saved weights are the memory that is filled again."""

    def __init__(self, twin: nn.Module, layer: nn.Module, reshard: bool) -> None:
        self.layer, self.leaves = cast(Any, layer), reshard
        self.backward = False
        """Whether the backward pass is in it: a forward in there makes activations again."""
        twin.register_forward_pre_hook(self._enter, with_kwargs=True)
        twin.register_forward_hook(self._leave)

    def end(self) -> None:
        """Its passes are done: the first layer's input has no gradient that would tell."""
        self.backward = False
        self.layer.reshard()

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.backward:
            return
        self.layer.unshard()
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(self._after)

    def _leave(self, _: nn.Module, args: Any, out: Any) -> None:
        if self.backward:
            return
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(self._before)
        if self.leaves or not torch.is_grad_enabled():
            self.layer.reshard()

    def _before(self, _: Tensor) -> None:
        self.backward = True
        self.layer.unshard()

    def _after(self, _: Tensor) -> None:
        self.backward = False
        if self.leaves:
            self.layer.reshard()


class Shards:
    """The team of ranks that hold a copy of the model together, and of their copies: gradients are summed."""

    def __init__(
        self, scored: nn.Module, held: Mapping[str, nn.Parameter], grid: Grid, again: Sequence[Again] = ()
    ) -> None:
        self.scored, self.say, self.peers = cast(Any, scored), grid.data("expert"), grid.peers
        self.again = again
        self.shards = grid.degrees.shard * grid.degrees.context
        self.cut = {name: cast(DTensor, p) for name, p in held.items() if isinstance(p, DTensor)}
        """The trained parameters that lie on several ranks."""
        self.whole = {name: p for name, p in held.items() if name not in self.cut}
        """Those that every rank holds."""
        self.all = grid.group("replicate", "shard", "context") if self.whole else None
        self.blocks = {name: block(p) for name, p in self.cut.items()}
        blocks = {name: nn.Parameter(local(p)) for name, p in self.cut.items()}
        self.params = {name: blocks.get(name, p) for name, p in held.items()}
        """What the optimizer updates: this rank's blocks, in the memory of the parameters."""
        if grid.degrees.replicate > 1:
            copies = grid.group("replicate")
            for p in blocks.values():  # adapters begin at random; the rest is read from the same files
                dist.broadcast(p.data, dist.get_global_rank(copies, 0), group=copies)

    def around(self, index: int, turns: int) -> AbstractContextManager[Any]:
        """Blocks of gradients are summed after every micro-batch, so that no rank keeps whole ones; those of copies
        after the last."""
        self.scored.set_requires_all_reduce(index + 1 == turns)
        return nullcontext()

    def after(self, index: int, turns: int) -> None:
        """After the last micro-batch the optimizer gets its blocks of the gradients."""
        for each in self.again:
            each.end()
        if index + 1 < turns:
            return
        for name, p in self.cut.items():
            grad = cast("DTensor | None", p.grad)
            self.params[name].grad = None if grad is None else local(grad)
            p.grad = None
        if self.whole:
            sum_over(gradients(self.whole.values()), self.all)

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """Summed over the ranks that saw different rows, in their order."""
        return summed(self.say(own))

    def norm(self, params: Mapping[str, nn.Parameter]) -> float:
        """Of the blocks of one copy: all copies have the same gradients, and all ranks the same number."""
        said = self.say(norm(p for name, p in params.items() if name in self.cut))
        return hypot(*said[: self.shards], norm(p for name, p in params.items() if name in self.whole))

    def part(self, name: str, like: Tensor, value: Tensor) -> Tensor | Slice:
        """A block, or what has another shape than the parameter: a count of steps, which all ranks share."""
        cut = name in self.cut and value.dim() and value.shape == like.shape
        return Slice(value, *self.blocks[name]) if cut else value

    def lying(self, name: str, p: Tensor) -> Sequence[Slice]:
        """A block, or all of it."""
        return (Slice(p.detach(), *self.blocks[name]) if name in self.cut else whole(p.detach()),)

    def own(self, name: str, like: Tensor, whole: Tensor) -> Tensor:
        """This rank's block of what has the parameter's shape."""
        if name not in self.cut or tuple(whole.shape) != self.blocks[name][0]:
            return whole
        start = self.blocks[name][1]
        return whole[tuple(slice(a, a + n) for a, n in zip(start, like.shape, strict=True))]

    def assemble(self, model: nn.Module, peers: Peers) -> None:
        """From the blocks of all ranks."""
        make_whole(model, peers)


def _mesh(grid: Grid) -> DeviceMesh:
    """What parameters are cut over: ranks that split rows hold them together too; and over what they are copied."""
    inner = "shard"
    if grid.degrees.context > 1:
        grid.group("shard", "context")
        inner = "shard_context"
    return grid.mesh["replicate", inner] if grid.degrees.replicate > 1 else grid.mesh[inner]


def stepper(node: Fsdp, parts: Parts, grid: Grid | None) -> Steps:
    """Steps of ranks that share parameters; the memory of `parts` is given up.

    Raises:
        ModelError: what the model is made of cannot be cut.
    """
    if grid is None:
        parts.deferred.fill(parts.scored)
        return Steps(parts.scored, parts.params, parts.optimizer(parts.params), parts.ways)
    names = {id(p): name for name, p in parts.scored.named_parameters()}
    places = {name: names[id(p)] for name, p in parts.params.items()}
    shard(node, parts.scored, parts.layers, grid, cast_to(parts), parts.deferred, [twin for twin, _ in parts.twins])
    there = dict(parts.scored.named_parameters())
    again = [Again(twin, layer, node.reshard) for twin, layer in parts.twins]
    team = Shards(parts.scored, {name: there[place] for name, place in places.items()}, grid, again)
    ways = replace(parts.ways, device=grid.mesh.device_type)
    if ways.offload is not None:
        ways = replace(ways, offload=Offload(tuple(there.values()), ways.offload.host))
    return Steps(parts.scored, team.params, parts.optimizer(team.params), ways, team)


def cast_to(parts: Parts) -> torch.dtype | None:
    """The type that layers are gathered in, where that is not their own: that of their products under autocast, which
    casts each weight to it anyway. Only of layers that are trained whole: adapters compute with weights themselves."""
    held = [p for layer in parts.layers for p in layer.parameters()]
    return parts.ways.compute if all(p.requires_grad and p.dtype == torch.float32 for p in held) else None


def shard(
    node: Fsdp,
    scored: nn.Module,
    layers: Sequence[nn.Module],
    grid: Grid,
    kind: torch.dtype | None = None,
    deferred: Deferred = Deferred(),
    twins: Sequence[nn.Module] = (),
) -> None:
    """Cuts a model, layer by layer: a layer is read, and the memory of its whole weights given up before the next one.
    Layers gathered in another type (`kind`) leave their norms to every rank: those compute in their own. Of `twins`,
    which run the weights of these layers, what is their own is cut.

    Raises:
        ModelError: a parameter cannot be cut, or not together with the others of its group.
    """
    options: dict[str, Any] = {
        "mesh": _mesh(grid),
        "offload_policy": CPUOffloadPolicy(torch.cuda.is_available()) if node.offload == "cpu" else OffloadPolicy(),
    }
    inner, outer = (MixedPrecisionPolicy(to, torch.float32, cast_forward_inputs=False) for to in (kind, None))
    kept = {p for layer in layers for p in _vectors(layer)} if kind is not None else set()
    left = kept | _shared(scored, layers)
    for layer in layers:
        deferred.fill(layer)
        with _cut(scored, [p for p in layer.parameters() if p not in left]):
            cut = fully_shard(
                layer, reshard_after_forward=node.reshard, ignored_params=left, mp_policy=inner, **options
            )
            _summing(cut, grid.peers.phase)
    for twin in twins:
        there = {p for p in twin.parameters() if isinstance(p, DTensor)}
        with _cut(scored, [p for p in twin.parameters() if p not in there | left]):
            cut = fully_shard(twin, reshard_after_forward=node.reshard, ignored_params=there | left, **options)
            _summing(cut, grid.peers.phase)
    deferred.fill(scored)
    with _cut(scored, [p for p in scored.parameters() if not isinstance(p, DTensor) and p not in kept]):
        _summing(fully_shard(scored, mp_policy=outer, **options), grid.peers.phase)
    for name in FORWARDS:
        if hasattr(scored, name):
            register_fsdp_forward_method(scored, name)
            setattr(scored, name, _then_reshard(scored, getattr(scored, name)))
    scored.register_forward_hook(lambda module, given, out: _reshard_without_backward(module))


def _summing(group: Any, phase: Callable[[str], None]) -> None:
    """Gradients are summed, and as often as the other ranks', whatever a rank's rows have used."""
    group.set_custom_reduce_scatter(Reducing(phase))
    group.set_gradient_divide_factor(1.0)
    group.set_force_sum_reduction_for_comms(True)
    if hasattr(group, "set_reduce_scatter_unused_params"):  # since torch 2.13
        group.set_reduce_scatter_unused_params(True, recurse=False)


def _vectors(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of modules that have vectors alone: norms."""
    for module in layer.modules():
        held = list(module.parameters(recurse=False))
        if all(p.dim() == 1 for p in held):
            yield from held


def _shared(scored: nn.Module, layers: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Parameters of a layer that are used outside of it too: they are gathered with what is outside.

    Raises:
        ModelError: layers share one, and nothing outside has it.
    """
    inside = [set(layer.parameters()) for layer in layers]
    within = {module for layer in layers for module in layer.modules()}
    outside = {p for module in scored.modules() if module not in within for p in module.parameters(recurse=False)}
    met: set[nn.Parameter] = set()
    shared: set[nn.Parameter] = set()
    for params in inside:
        shared |= params & (met | outside)
        met |= params
    if odd := shared - outside:
        name = next(name for name, p in scored.named_parameters() if p in odd)
        raise ModelError(f"layers share {name}, which cannot be cut", fix=OTHER, key="parallel.strategy")
    return shared


@contextmanager
def _cut(scored: nn.Module, params: Sequence[nn.Parameter]) -> Iterator[None]:
    """Around the cutting of parameters that are gathered together: after it their old memory is free, whoever still
    holds them.

    Raises:
        ModelError: they cannot be cut.
    """
    scalar = [name for name, p in scored.named_parameters() if not p.dim() and any(p is one for one in params)]
    if scalar:
        raise ModelError(f"{scalar[0]} is one number, which cannot be cut", fix=OTHER, key="parallel.strategy")
    kinds = {str(p.dtype).removeprefix("torch.") for p in params if p.requires_grad}
    if len(kinds) > 1:
        what = f"{' and '.join(sorted(kinds))} are trained in one layer, and gradients of one type travel together"
        raise ModelError(what, fix=OTHER, key="parallel.strategy")
    for p in params:
        if not p.is_contiguous():
            p.data = p.data.contiguous()
    yield
    for p in params:
        p.data = p.data.new_empty(0)


def _then_reshard(scored: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        made = method(*args, **kwargs)
        cast(Any, scored).reshard()
        return made

    return run


def _reshard_without_backward(scored: nn.Module) -> None:
    """Without a backward pass nobody gives up what lies outside of layers, and it would be old after the next step."""
    if not torch.is_grad_enabled():
        cast(Any, scored).reshard()
