"""The recipe's nodes for ranks: strategies, and the degrees of each kind of parallelism."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from llmkit.core.config import Later, config, setting
from llmkit.parallel.degrees import Degrees, degrees

if TYPE_CHECKING:
    from llmkit.core.ranks import Ranks
    from llmkit.parallel.grid import Grid
    from llmkit.parallel.group import Group
    from llmkit.parallel.steps import Parts, Steps


@config
class Auto:
    """One process on one device; on more ranks `fsdp` where `parallel.shard` asks for it, else `ddp`."""

    kind: Literal["auto"] = "auto"


@config
class Single:
    """One process on one device."""

    kind: Literal["single"] = "single"

    def stepper(self, parts: Parts, grid: Grid | None) -> Steps:
        """Parts of a model in training -> what makes its steps."""
        from llmkit.parallel.steps import Steps

        return Steps(parts.scored, parts.params, parts.optimizer(parts.params), parts.ways)


@config
class Ddp:
    """A whole replica on every rank; each sees other rows, and gradients are summed."""

    kind: Literal["ddp"] = "ddp"

    def stepper(self, parts: Parts, grid: Grid | None) -> Steps:
        """Parts of a model in training -> what makes its steps."""
        from llmkit.parallel.ddp import stepper

        return stepper(parts, grid)


Strategy = Annotated[Auto | Single | Ddp, Later(("fsdp", "zero"))]


@config
class Parallel:
    """How the work is spread over ranks; the product of all degrees is the number of ranks."""

    _short: ClassVar[str] = "strategy"
    strategy: Strategy = Auto()
    replicate: int | Literal["auto"] = setting(default="auto", least=1)
    """Groups of ranks that hold copies of each other; `auto` is what is left."""
    shard: int | Literal["auto"] = setting(default="auto", later=True)
    """Ranks that share one copy of parameters, gradients and optimizer."""
    tensor: int = setting(default=1, later=True)
    context: int = setting(default=1, least=1)
    """Ranks that share every row: each holds a part of its tokens, and attention alone talks."""
    context_method: Literal["auto", "ulysses", "ring"] = "auto"
    """`ulysses` deals attention's heads out, `ring` sends keys and values round; `auto` is `ulysses` where `context`
    divides the heads, else `ring`."""
    pipeline: int = setting(default=1, later=True)
    expert: int = setting(default=1, later=True)

    def degrees(self, world: int) -> Degrees:
        """How many ranks there are of each kind.

        Raises:
            RecipeError: they do not go with `world`.
        """
        replicate = None if self.replicate == "auto" else self.replicate
        shard = None if self.shard == "auto" else self.shard
        return degrees(world, self.resolve(world).kind, replicate, shard, self.context, self.tensor, self.pipeline)

    def resolve(self, world: int) -> Single | Ddp:
        """The strategy itself, where it is `auto`."""
        if not isinstance(self.strategy, Auto):
            return self.strategy
        return Single() if world == 1 else Ddp()

    def join(self, ranks: Ranks, device: str) -> AbstractContextManager[Group]:
        """The group of all ranks, until the end.

        Raises:
            PeerError: they do not come together.
        """
        from llmkit.parallel.group import joined

        return joined(ranks, device)
