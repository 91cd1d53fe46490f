"""The ranks that share experts, around a strategy's own: gradients, sums, checkpoints and the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from llmkit.core.errors import ModelError
from llmkit.parallel.ddp import alike
from llmkit.parallel.expert import cut
from llmkit.parallel.grid import Grid
from llmkit.parallel.steps import Parts, Steps
from llmkit.parallel.team import Sums, summed
from llmkit.parallel.tensor import Layout, Place
from llmkit.parallel.tensor_team import Held, check_same, logits, told


class Sharers(Held):
    """Each rank has all of the gradient of its experts, for their tokens came to it, and of all else the part of its
    own rows."""

    def __init__(self, layout: Layout, given: Parts, model: nn.Module, grid: Grid) -> None:
        super().__init__(layout, given, model, grid.peers)
        self.say = grid.data()
        """A JSON value of this rank -> those of all ranks that see different tokens."""

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """Summed over all of them, those of the strategy's own team too."""
        return summed({name: tuple(values) for name, values in said.items()} for said in self.say(own))


def stepper(parts: Parts, grid: Grid, strategy: Callable[[Parts, Grid], Steps]) -> Steps:
    """Steps of a strategy over a model of which each rank of the axis `expert` holds a part of the experts.

    Raises:
        ModelError: transformers has no plan for the model, or what is left of it does not give what the whole gives.
    """
    place = Place(grid.degrees.place(grid.rank)["expert"], grid.degrees.expert, grid.group("expert"))
    base, scored = cast(Any, parts.base), cast(Any, parts.scored)
    if scored.model is not base:
        alike(parts.params, place.group)
    with parts.deferred.running():
        before = logits(base)
    layout = cut(base, parts.experts, place, parts.deferred)
    if not layout.cuts:
        why = (
            "; ".join(sorted(set(layout.whole.values())))
            or "no module of it is called as transformers' plan for experts says"
        )
        what = f"{type(base).__name__} cannot be cut for expert {place.count}: {why}"
        raise ModelError(what, fix="set parallel.expert=1", key="parallel.expert")
    with parts.deferred.running():
        after = logits(base)
    check_same(base, before, after, f"expert {place.count}", "parallel.expert")
    parts.say(told(layout))
    made = {id(tensor) for tensor, _ in (*layout.cuts, *layout.low)}
    layout.partial += [p for p in parts.params.values() if id(p) not in made]
    return Sharers(layout, parts, scored.model, grid).over(strategy(parts, grid))
