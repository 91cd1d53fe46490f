"""The ranks that hold a model together, around a strategy's own: gradients, their norm, checkpoints and the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.core.errors import ModelError
from llmkit.core.sliced import Slice
from llmkit.parallel.cuts import Cut
from llmkit.parallel.grid import Grid
from llmkit.parallel.steps import Parts, Steps
from llmkit.parallel.team import Sums, Team
from llmkit.parallel.tensor import Layout, Place, cut


class Held:
    """A strategy's team (`inner`), each of whose parameters is a part of the model's, or whole on all ranks here."""

    def __init__(
        self,
        inner: Team,
        layout: Layout,
        params: Mapping[str, nn.Parameter],
        names: Mapping[str, int],
        adapted: bool,
    ):
        self.inner, self.layout, self.params, self.group = inner, layout, params, layout.place.group
        self.adapted = adapted
        """Only the adapter is exported."""
        by_id = {id(tensor): made for tensor, made in (*layout.cuts, *layout.low)}
        self.cuts: dict[str, Cut] = {name: by_id[key] for name, key in names.items() if key in by_id}
        partial = {id(tensor) for tensor in layout.partial}
        self.partial = [name for name, key in names.items() if key in partial and name in params]
        self.sharing = _sharing(layout.place, {span.share for one in self.cuts.values() for span in one.spans})

    def around(self, index: int, turns: int) -> AbstractContextManager[Any]:
        """As the strategy does."""
        return self.inner.around(index, turns)

    def after(self, index: int, turns: int) -> None:
        """Of what is whole and was used in part, and of what lies on several ranks, the gradients are summed."""
        self.inner.after(index, turns)
        if index + 1 < turns:
            return
        _sum([_local(p.grad) for p in map(self.params.__getitem__, self.partial) if p.grad is not None], self.group)
        shared: dict[int, list[Tensor]] = {}
        for name, one in self.cuts.items():
            grad = self.params[name].grad if name in self.params else None
            for span, view in one.views(_local(grad)) if grad is not None and one.share != 1 else ():
                shared.setdefault(span.share, []).append(view)
        for share, views in sorted(shared.items()):
            if share > 1:
                _sum(views, self.sharing[share])

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """As the strategy does: all ranks here say the same."""
        return self.inner.totals(own)

    def norm(self, params: Mapping[str, nn.Parameter]) -> float:
        """Parts are summed over the ranks here, what lies on several of them once; what is whole counts once."""
        squares = 0.0
        for share in sorted({one.share for one in self.cuts.values()}):
            mine = {n: p for n, p in params.items() if n in self.cuts and self.cuts[n].share == share}
            squares += self.inner.norm(mine) ** 2 / share if share else sum(map(self._mixed, mine, mine.values()))
        device = next(iter(params.values())).device
        total = torch.tensor(squares, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        whole = self.inner.norm({name: p for name, p in params.items() if name not in self.cuts})
        return math.hypot(whole, math.sqrt(float(total)))

    def _mixed(self, name: str, p: nn.Parameter) -> float:
        views = self.cuts[name].views(p.grad) if p.grad is not None else ()
        return sum(float(view.norm()) ** 2 / span.share for span, view in views)

    def part(self, name: str, like: Tensor, value: Tensor) -> Tensor | Slice:
        """The whole, put together by the ranks here."""
        one = self.cuts.get(name)
        if one is None or value.shape != one.held or not one.even:
            return self.inner.part(name, like, value)
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in one.dealt]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return one.whole(parts)

    def own(self, name: str, like: Tensor, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        one = self.cuts.get(name)
        return self.inner.own(name, like, whole if one is None or whole.shape != one.shape else one.of(whole))

    def assemble(self) -> None:
        """The model is whole again on the first rank here, as it is exported."""
        self.inner.assemble()
        for hook in self.layout.hooks:
            hook.remove()
        for tensor, one in (*self.layout.low, *(() if self.adapted else self.layout.cuts)):
            if one.even:
                _assemble(tensor, one, self.layout.place)


def _assemble(tensor: Tensor, cut: Cut, place: Place) -> None:
    """In the memory of the host, where the device is another: it may have no room for the whole."""
    first, part = dist.get_global_rank(place.group, 0), tensor.detach().contiguous()
    rooms = [torch.empty_like(part) for _ in cut.dealt] if place.index == 0 else None
    dist.gather(part, rooms, dst=first, group=place.group)
    if rooms is not None:
        tensor.data = cut.whole([room.cpu() for room in rooms])


def _local(grad: Tensor) -> Tensor:
    """What of a gradient lies in this process."""
    inner: Callable[[], Tensor] | None = getattr(grad, "to_local", None)
    return grad if inner is None else inner()


def _sum(tensors: list[Tensor], group: Any) -> None:
    """Each is summed over the ranks of a group, in place, all in one message."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view(tensor.shape))


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
    place = Place(grid.degrees.place(grid.rank)["tensor"], grid.degrees.tensor, grid.group("tensor"))
    base: Any = parts.base
    before = _logits(base)
    layout = cut(base, parts.plan, place)
    if not layout.cuts:
        why = "; ".join(sorted(set(layout.whole.values()))) or "transformers has no plan for it"
        what = f"{type(base).__name__} cannot be cut for tensor {place.count}: {why}"
        raise ModelError(what, fix="set parallel.tensor=1", key="parallel.tensor")
    _check_same(base, before, _logits(base), place.count)
    names = {name: id(p) for name, p in parts.params.items()}
    kept = {name: p for name, p in parts.params.items() if p.requires_grad}
    steps = strategy(replace(parts, params=kept), grid)
    steps.team = Held(steps.team, layout, steps.params, names, adapted=getattr(parts.scored, "model", base) is not base)
    return steps


def _logits(base: Any) -> Tensor:
    """What a model says of a few tokens."""
    training = base.training
    base.eval()
    tokens = torch.arange(1, 9, device=next(base.parameters()).device)[None]
    with torch.no_grad():
        made: Tensor = base(input_ids=tokens % int(base.config.get_text_config().vocab_size), use_cache=False).logits
    base.train(training)
    return made.float()


def _check_same(base: Any, before: Tensor, after: Tensor, count: int) -> None:
    close = 1e-4 if next(base.parameters()).dtype == torch.float32 else 5e-2
    gap = float((after - before).norm() / before.norm())
    if not gap <= close:
        what = f"{type(base).__name__} cut for tensor {count} gives other logits than whole (off by {gap:.2g})"
        raise ModelError(what, fix="set parallel.tensor=1", key="parallel.tensor")
