"""The ranks that hold a model together, around a strategy's own: gradients, their norm, checkpoints and the result."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmkit.core.deferred import Deferred
from llmkit.core.errors import ModelError
from llmkit.core.peers import Peers
from llmkit.core.sliced import Slice, whole
from llmkit.parallel.collect import block, collected, local, put
from llmkit.parallel.ddp import alike
from llmkit.parallel.grid import Grid
from llmkit.parallel.regions import AFTER
from llmkit.parallel.steps import Parts, Steps
from llmkit.parallel.sums import sum_over
from llmkit.parallel.team import Sums, Team
from llmkit.parallel.tensor import Layout, Place, cut


class Held:
    """A strategy's team (`inner`), each of whose parameters is a part of the model's, or whole on all ranks here."""

    def __init__(self, layout: Layout, given: Parts, model: nn.Module, peers: Peers) -> None:
        self.layout, self.group, self.peers = layout, layout.place.group, peers
        self.inner: Team
        self.params: Mapping[str, nn.Parameter]
        made = {id(tensor): one for tensor, one in (*layout.cuts, *layout.low)}
        partial, low = ({id(t) for t in some} for some in (layout.partial, [tensor for tensor, _ in layout.low]))
        self.cuts = {name: made[id(p)] for name, p in given.params.items() if id(p) in made}
        self.partial = [name for name, p in given.params.items() if id(p) in partial]
        tensors = dict(_tensors(model))
        self.places = {name: made[id(t)] for name, t in tensors.items() if id(t) in made}
        """The same by the names that tensors have in the model, trained or not."""
        self.factors = {name for name, t in tensors.items() if id(t) in low}
        self.sharing = _sharing(layout.place, {span.share for one in self.cuts.values() for span in one.spans})

    def over(self, steps: Steps) -> Steps:
        """Steps of the strategy that has its own team, with this one around it."""
        self.inner, self.params, steps.team = steps.team, steps.params, self
        return steps

    def around(self, index: int, turns: int) -> AbstractContextManager[Any]:
        """As the strategy does."""
        return self.inner.around(index, turns)

    def after(self, index: int, turns: int) -> None:
        """Of what is whole and was used in part, and of what lies on several ranks, the gradients are summed."""
        self.inner.after(index, turns)
        self.peers.phase("reduce")  # on a device the host is here long before the layers' sums are made
        if index + 1 < turns:
            return
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        sum_over([grads[name] for name in self.partial if name in grads], self.group)
        for share, group in self.sharing.items():
            sum_over([view for name in self.cuts if name in grads for view in self._shared(name, share)], group)

    def _shared(self, name: str, share: int) -> list[Tensor]:
        """What of a gradient lies on `share` ranks: of rows of q, k and v in one, those of some."""
        one, p = self.cuts[name], self.params[name]
        if p.grad is None or share not in one.shares:
            return []
        if one.share:
            return [p.grad]
        block = whole(self.inner.part(name, p, p.grad))
        return [view for span, _, view in one.within(block) if span.share == share]

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """As the strategy does: all ranks here say the same."""
        return self.inner.totals(own)

    def norm(self, params: Mapping[str, nn.Parameter]) -> float:
        """Parts are summed over the ranks here, what lies on several of them once; what is whole counts once."""
        squares = 0.0
        for share in sorted({share for one in self.cuts.values() for share in one.shares}):
            mine = {name: _of(self._shared(name, share)) for name in params if name in self.cuts}
            squares += self.inner.norm(mine) ** 2 / share
        device = next(iter(params.values())).device
        total = torch.tensor(squares, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        rest = self.inner.norm({name: p for name, p in params.items() if name not in self.cuts})
        return math.hypot(rest, math.sqrt(float(total)))

    def part(self, name: str, like: Tensor, value: Tensor) -> Tensor | Slice:
        """This rank's block; of what is made of several parts, the whole on the main rank."""
        inner, one = self.inner.part(name, like, value), self.cuts.get(name)
        if one is None or value.shape != like.shape or not value.dim():
            return inner
        pieces = one.pieces(whole(inner))
        if len(pieces) == 1:
            return pieces[0]
        found = dict(collected({str(k): piece for k, piece in enumerate(pieces)}, self.peers))
        made = one.joined([found[str(k)] for k in range(len(pieces))]) if found else value.new_empty((0,) * value.dim())
        return Slice(made, one.shape, (0,) * value.dim())

    def lying(self, name: str, p: Tensor) -> Sequence[Slice]:
        """Of what the strategy holds, the spans of the whole."""
        inner, one = self.inner.lying(name, p), self.cuts.get(name)
        return inner if one is None else [span for block in inner for span in one.blocks(block)]

    def own(self, name: str, like: Tensor, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        one = self.cuts.get(name)
        return self.inner.own(name, like, whole if one is None or tuple(whole.shape) != one.shape else one.of(whole))

    def assemble(self, model: nn.Module, peers: Peers) -> None:
        """From the parts of all ranks, in the host's memory: all of a model's, and of an adapter its own."""
        for hook in self.layout.hooks:
            hook.remove()
        adapted = hasattr(model, "peft_config")
        held = {n: t for n, t in _tensors(model) if n in self.places or isinstance(t, DTensor)}
        held = {n: t for n, t in held.items() if not adapted or t.requires_grad or n in self.factors}
        blocks = {
            n: Slice(local(t), *block(t)) if isinstance(t, DTensor) else whole(t.detach()) for n, t in held.items()
        }
        pieces = {n: self.places[n].pieces(one) if n in self.places else [one] for n, one in blocks.items()}
        parts = {f"{n}@{k}": piece for n, some in pieces.items() for k, piece in enumerate(some)}
        found: dict[str, list[Tensor]] = {}
        for key, tensor in collected(parts, peers):
            name = key.rpartition("@")[0]
            found.setdefault(name, []).append(tensor)
            if len(found[name]) == len(pieces[name]):
                some = found.pop(name)
                put(model, held[name], self.places[name].joined(some) if name in self.places else some[0])
        for module, inner in self.layout.biases:
            bias = getattr(module, AFTER)
            delattr(module, AFTER)
            inner.bias = bias


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _of(grads: list[Tensor]) -> nn.Parameter:
    """A parameter with these parts of a gradient, as far as its norm goes."""
    made = nn.Parameter(torch.empty(0))
    if grads:
        made.data = grads[0] if len(grads) == 1 else torch.cat(grads)
        made.grad = made.data
    return made


def _sharing(place: Place, shares: set[int]) -> dict[int, Any]:
    """The groups of neighbours that hold the same spans, by how many they are."""
    ranks, found = dist.get_process_group_ranks(place.group), {}
    for share in sorted(shares - {1}):
        first = place.index // share * share
        found[share] = dist.new_group(ranks[first : first + share], use_local_synchronization=True)
    return found


def stepper(parts: Parts, grid: Grid, strategy: Callable[[Parts, Grid], Steps]) -> Steps:
    """Steps of a strategy over what of the model lies on each rank of the axis `tensor`.

    Raises:
        ModelError: transformers has no plan for the model, or what is left of it does not give what the whole gives.
    """
    layout = divided(parts, grid, "tensor", cut, parts.plan, "transformers has no plan for it")
    return Held(layout, parts, cast(Any, parts.scored).model, grid.peers).over(strategy(parts, grid))


Cutting = Callable[[Any, Mapping[str, str], Place, Deferred], Layout]
"""A model, a plan, where this rank stands, and what is yet to be read -> what is left of the model here."""


def divided(parts: Parts, grid: Grid, axis: str, cut: Cutting, plan: Mapping[str, str], none: str) -> Layout:
    """What of the model is left here, where each rank along `axis` has a part by a plan; `none`: why nothing is cut.

    Raises:
        ModelError: nothing is cut, or the parts do not give what the whole gives.
    """
    place = Place(grid.degrees.place(grid.rank)[axis], getattr(grid.degrees, axis), grid.group(axis))
    base = cast(Any, parts.base)
    if cast(Any, parts.scored).model is not base:
        alike(parts.params, place.group)
    layout = left(base, place, parts.deferred, cut, plan, f"parallel.{axis}", none)
    parts.say(told(layout))
    return layout


def left(
    base: Any, place: Place, deferred: Deferred, cut: Cutting, plan: Mapping[str, str], key: str, none: str
) -> Layout:
    """What of a model is left at a place, by a plan; `key` is the setting that asks for it.

    Raises:
        ModelError: nothing is cut, or the parts do not give what the whole gives.
    """
    axis = key.rpartition(".")[2]
    with deferred.running():
        before = logits(base)
    layout = cut(base, plan, place, deferred)
    if not layout.cuts:
        why = "; ".join(sorted(set(layout.whole.values()))) or none
        what = f"{type(base).__name__} cannot be cut for {axis} {place.count}: {why}"
        raise ModelError(what, fix=f"set {key}=1", key=key)
    with deferred.running():
        after = logits(base)
    check_same(base, before, after, f"{axis} {place.count}", key)
    return layout


def told(layout: Layout) -> str:
    """How much of the model's cut weights lies here, and what is whole where it might be cut."""
    here, all_ = (
        sum(math.prod(size) for size in sizes)
        for sizes in zip(*((c.held, c.shape) for _, c in layout.cuts), strict=True)
    )
    kept = {re.sub(r"\d+", "*", path): why for path, why in layout.whole.items()}
    said = [f"{here:,} of {all_:,} weights of layers are on each of {layout.place.count} ranks"]
    return ", ".join(said + [f"{path} whole on all ({why})" for path, why in kept.items()])


def logits(base: Any) -> Tensor:
    """What a model says of a few tokens."""
    training = base.training
    base.eval()
    tokens = torch.arange(1, 9, device=next(base.parameters()).device)[None]
    with torch.no_grad():
        made: Tensor = base(input_ids=tokens % int(base.config.get_text_config().vocab_size), use_cache=False).logits
    base.train(training)
    return made.float()


def check_same(base: Any, before: Tensor, after: Tensor, why: str, key: str) -> None:
    """Raises:
    ModelError: a model that was cut says something else than before.
    """
    close = 1e-4 if next(base.parameters()).dtype == torch.float32 else 5e-2
    gap = float((after - before).norm() / before.norm())
    if not gap <= close:
        what = f"{type(base).__name__} cut for {why} gives other logits than whole (off by {gap:.2g})"
        raise ModelError(what, fix=f"set {key}=1", key=key)
