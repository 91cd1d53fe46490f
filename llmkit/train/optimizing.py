"""What all optimizers of a recipe share: their rates, which parameters they hold for, and how a state is counted."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.core.config import Conflict, config, setting
from llmkit.core.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from llmkit.parallel.optimizers import Optimizers

OUTER = re.compile(r"(^|[._])(embed\w*|wte|wpe|lm_head|embed_out)([._]|$)")
"""Names of embeddings and heads, which see tokens and not directions: Muon and low-rank optimizers leave them alone."""
NO_FACTORS: Mapping[str, float] = MappingProxyType({})


@config
class Group:
    """Parameters with a rate or a decay of their own; of several groups that match, the last one counts."""

    match: str
    """A glob over the names of trained parameters, such as `*.layers.0.*` or `*embed*`."""
    lr: float | None = setting(default=None, above=0.0)
    factor: float | None = setting(default=None, above=0.0)
    """Times `optim.lr`, instead of a rate."""
    weight_decay: float | None = setting(default=None, least=0.0)
    """For matrices and vectors alike."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.lr is not None and self.factor is not None:
            yield Conflict("factor", "both say what the rate is", "keep one of the two", "lr")
        if self.lr is None and self.factor is None and self.weight_decay is None:
            yield Conflict("match", "the group changes nothing", "give lr, factor or weight_decay", "")


@dataclass(frozen=True)
class Rated:
    """Parameters that share a rate and a decay."""

    params: dict[str, nn.Parameter]
    lr: float
    weight_decay: float

    def torch(self) -> dict[str, Any]:
        """As torch's optimizers take it."""
        return {"params": list(self.params.values()), "lr": self.lr, "weight_decay": self.weight_decay}


@config
class Optimizing(ABC):
    """An optimizer: what is common to all of them."""

    constant: ClassVar[bool] = False
    """It averages instead of lowering the rate, and wants it constant."""
    device: ClassVar[str] = ""
    """The only kind of device that it runs on."""
    elementwise: ClassVar[bool] = False
    """What it does to a number depends on that number's gradients alone: parameters may be cut anywhere."""
    carried: ClassVar[tuple[str, ...]] = ()
    """What it keeps in its parameter groups between steps."""
    shaping: ClassVar[tuple[str, ...]] = ("kind",)
    """The settings that say what its state looks like: with others it begins anew."""
    kind: str = ""
    lr: float = setting(default=2e-4, above=0.0)
    weight_decay: float = setting(default=0.0, least=0.0)
    """Applied to matrices only, never to norms, biases and other vectors."""
    clip: float = setting(default=1.0, least=0.0)
    """Largest gradient norm; 0 turns clipping off."""
    groups: tuple[Group, ...] = ()
    """Parameters with a rate or a decay of their own."""
    layer_decay: float = setting(default=1.0, above=0.0, most=1.0)
    """The rate of a layer is this times that of the layer above it; embeddings lie below all layers."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what: nothing here."""
        yield from ()

    @abstractmethod
    def moments(self, inner: int, outer: int, width: int) -> float:
        """Bytes of state: of `inner` parameters in layers `width` wide, and of `outer` in embeddings and head."""

    def ready(self) -> None:
        """Sees to it that what the optimizer needs is installed: torch has what most need."""
        return None

    @abstractmethod
    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """The optimizers over all parameters of `groups`; each parameter in exactly one."""

    def build(
        self,
        params: Mapping[str, nn.Parameter],
        factors: Mapping[str, float] = NO_FACTORS,
        apart: bool = False,
        among: Mapping[str, nn.Parameter] | None = None,
    ) -> Optimizers:
        """The optimizer over named parameters, whose rates are multiplied by `factors` where it names them.

        `apart`: each parameter can be updated alone. `among`: all parameters of the run, where `params` are some.

        Raises:
            RecipeError: a group matches no parameter.
        """
        from llmkit.parallel.optimizers import Optimizers

        groups = rated(self, params, factors, among)
        if apart:
            groups = [replace(group, params={name: p}) for group in groups for name, p in group.params.items()]
            return Optimizers([part for group in groups for part in self.make([group])], self.carried)
        return Optimizers(self.make(groups), self.carried)


def rated(
    node: Optimizing,
    params: Mapping[str, nn.Parameter],
    factors: Mapping[str, float],
    among: Mapping[str, nn.Parameter] | None = None,
) -> list[Rated]:
    """The parameters by rate and decay; those of the whole run are `among`.

    Raises:
        RecipeError: a group of the recipe, or `layer_decay`, matches no parameter.
    """
    matched(node, among or params)
    depths = below(among or params) if node.layer_decay < 1 else {}
    made: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
    for name, p in params.items():
        lr, decay = node.lr, node.weight_decay if p.ndim > 1 else 0.0
        for group in node.groups:
            if fnmatchcase(name, group.match):
                lr = group.lr or node.lr * (group.factor or 1.0)
                decay = decay if group.weight_decay is None else group.weight_decay
        lr *= node.layer_decay ** depths.get(name, 0) * factors.get(name, 1.0)
        made.setdefault((lr, decay), {})[name] = p
    return [Rated(held, lr, decay) for (lr, decay), held in made.items()]


def matched(node: Optimizing, names: Mapping[str, nn.Parameter]) -> list[tuple[str, int, int]]:
    """Of each group its glob, and how many tensors and parameters it holds for.

    Raises:
        RecipeError: it matches none.
    """
    found = []
    for index, group in enumerate(node.groups):
        held = [name for name in names if fnmatchcase(name, group.match)]
        if not held:
            bare = group.match.strip("*")
            near = get_close_matches(bare, names, 3, 0.3) or list(names)[:3]
            raise RecipeError(
                f"{group.match} matches none of {len(names)} trained parameters",
                fix=f"give a glob over names such as {', '.join(near)}",
                key=f"optim.groups.{index}.match",
            )
        found.append((group.match, len(held), sum(names[name].numel() for name in held)))
    return found


def below(names: Mapping[str, object]) -> dict[str, int]:
    """How many layers lie above each parameter: 0 for the last layer and what follows it, all of them for embeddings.

    Raises:
        RecipeError: no name tells a layer.
    """
    places = {name: found.groups() for name in names if (found := re.search(r"^(.*?)\.(\d+)\.", name))}
    if not places:
        raise RecipeError(
            "no trained parameter is in a numbered layer", fix="leave optim.layer_decay out", key="optim.layer_decay"
        )
    tops: dict[str, int] = {}
    for stack, number in places.values():
        tops[stack] = max(tops.get(stack, 0), int(number))
    deepest = max(tops.values()) + 1
    depths = {name: tops[stack] - int(number) for name, (stack, number) in places.items()}
    embeddings = {name: deepest for name in names if name not in depths and OUTER.search(name) and "head" not in name}
    return depths | embeddings


def parted(groups: Sequence[Rated], inner: Any) -> tuple[list[Rated], list[Rated]]:
    """The groups' parameters for which `inner(name, p)` holds, and the others."""
    sides: tuple[list[Rated], list[Rated]] = ([], [])
    for group in groups:
        for wanted, side in zip((True, False), sides, strict=True):
            held = {name: p for name, p in group.params.items() if bool(inner(name, p)) is wanted}
            if held:
                side.append(replace(group, params=held))
    return sides
