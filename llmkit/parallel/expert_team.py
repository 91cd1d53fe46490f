"""The ranks that share experts, around a strategy's own: gradients, sums, checkpoints and the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from llmkit.parallel.expert import cut
from llmkit.parallel.grid import Grid
from llmkit.parallel.steps import Parts, Steps
from llmkit.parallel.team import Sums, summed
from llmkit.parallel.tensor import Layout
from llmkit.parallel.tensor_team import Held, divided


class Sharers(Held):
    """Each rank has all of the gradient of its experts, for their tokens came to it, and of all else the part of its
    own rows."""

    def __init__(self, layout: Layout, given: Parts, model: nn.Module, grid: Grid) -> None:
        super().__init__(layout, given, model, grid.peers)
        self.say = grid.data()
        """A JSON value of this rank -> those of all ranks that see different tokens."""

    def totals(self, own: Sums) -> dict[str, tuple[float, ...]]:
        """Summed over all of them, those of the strategy's own team too."""
        return summed(self.say(own))


def stepper(parts: Parts, grid: Grid, strategy: Callable[[Parts, Grid], Steps]) -> Steps:
    """Steps of a strategy over a model of which each rank of the axis `expert` holds a part of the experts.

    Raises:
        ModelError: transformers has no plan for the model, or what is left of it does not give what the whole gives.
    """
    none = "no module of it is called as transformers' plan for experts says"
    layout = divided(parts, grid, "expert", cut, parts.experts, none)
    made = {id(tensor) for tensor, _ in (*layout.cuts, *layout.low)}
    layout.partial += [p for p in parts.params.values() if id(p) not in made]
    return Sharers(layout, parts, cast(Any, parts.scored).model, grid).over(strategy(parts, grid))
