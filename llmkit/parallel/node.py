"""The recipe's nodes for ranks: strategies, and the degrees of each kind of parallelism."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from llmkit.core.config import Later, config, setting
from llmkit.parallel.degrees import Deal, Degrees, check_virtual, deal, degrees

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
        from llmkit.parallel.ddp import stepper

        return stepper(parts, None)


@config
class Ddp:
    """A whole replica on every rank; each sees other rows, and gradients are summed."""

    kind: Literal["ddp"] = "ddp"

    def stepper(self, parts: Parts, grid: Grid | None) -> Steps:
        """Parts of a model in training -> what makes its steps."""
        from llmkit.parallel.ddp import stepper

        return stepper(parts, grid)


@config
class Fsdp:
    """Parameters, gradients and optimizer state cut over `parallel.shard` ranks, and each layer gathered while it runs
    (torch's `fully_shard`); with `parallel.replicate` such groups of ranks hold copies."""

    kind: Literal["fsdp"] = "fsdp"
    offload: Literal["none", "cpu"] = "none"
    """Where parameters, gradients and optimizer state lie while no layer needs them: on the device, or in the host's
    memory, where the optimizer then works."""
    reshard: bool = True
    """Whether a layer is given up after its forward pass and gathered again for its backward pass; without, more memory
    is used and less is sent."""

    def stepper(self, parts: Parts, grid: Grid | None) -> Steps:
        """Parts of a model in training -> what makes its steps."""
        from llmkit.parallel.fsdp import stepper

        return stepper(self, parts, grid)


Strategy = Annotated[Auto | Single | Ddp | Fsdp, Later(("zero",))]


@config
class Parallel:
    """How the work is spread over ranks; the product of all degrees is the number of ranks."""

    _short: ClassVar[str] = "strategy"
    strategy: Strategy = Auto()
    replicate: int | Literal["auto"] = setting(default="auto", least=1)
    """Groups of ranks that hold copies of each other; `auto` is what is left."""
    shard: int | Literal["auto"] = setting(default="auto", least=1)
    """Ranks that share one copy of parameters, gradients and optimizer; `auto` is what is left, under fsdp."""
    tensor: int = setting(default=1, least=1)
    """Ranks that hold each layer together: its heads and inner units are dealt out to them, and all see the same
    rows. It must divide the model's heads, and divide its key-value heads or be a multiple of them."""
    context: int = setting(default=1, later=True)
    pipeline: int = setting(default=1, later=True)
    expert: int = setting(default=1, later=True)

    virtual: int = setting(default=8, least=1)
    """With `deterministic`, the fixed shards of a step, a power of two: a run of any number of ranks that divides it
    gives the same bits under `single` and `ddp`."""

    def shards(self, world: int, deterministic: bool) -> int:
        """Virtual shards of a run, or 0 where it has none."""
        return self.virtual if deterministic and self.resolve(world).kind in ("single", "ddp") else 0

    def deal(self, ranks: Ranks, deterministic: bool) -> Deal:
        """Which part of each step this rank computes."""
        return deal(self.degrees(ranks.world), ranks.rank, self.shards(ranks.world, deterministic))

    def check(self, world: int, deterministic: bool) -> None:
        """Sees to it that the recipe goes with the number of ranks, before anything is begun.

        Raises:
            RecipeError: it does not.
        """
        made = self.degrees(world)
        if shards := self.shards(world, deterministic):
            check_virtual(made, shards)

    def degrees(self, world: int) -> Degrees:
        """How many ranks there are of each kind.

        Raises:
            RecipeError: they do not go with `world`.
        """
        replicate = None if self.replicate == "auto" else self.replicate
        shard = None if self.shard == "auto" else self.shard
        return degrees(world, self.resolve(world).kind, replicate, shard, self.context, self.tensor, self.pipeline)

    def resolve(self, world: int) -> Single | Ddp | Fsdp:
        """The strategy itself, where it is `auto`."""
        if not isinstance(self.strategy, Auto):
            return self.strategy
        if world == 1:
            return Single()
        return Fsdp() if self.cuts else Ddp()

    @property
    def cuts(self) -> bool:
        """Whether parameters are cut over ranks."""
        sharded = self.shard != "auto" and self.shard > 1
        return isinstance(self.strategy, Fsdp) or (isinstance(self.strategy, Auto) and sharded)

    def stepper(self, parts: Parts, grid: Grid | None) -> Steps:
        """Parts of a model in training -> what makes its steps.

        Raises:
            ModelError: the model cannot be cut as `tensor` asks for.
        """
        strategy = self.resolve(1 if grid is None else grid.degrees.world).stepper
        if grid is None or grid.degrees.tensor == 1:
            return strategy(parts, grid)
        from llmkit.parallel.tensor_team import stepper

        return stepper(parts, grid, strategy)

    def join(self, ranks: Ranks, device: str) -> AbstractContextManager[Group]:
        """The group of all ranks, until the end.

        Raises:
            PeerError: they do not come together.
        """
        from llmkit.parallel.group import joined

        return joined(ranks, device)
