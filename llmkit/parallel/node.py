"""The recipe's nodes for ranks: strategies, and the degrees of each kind of parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.core.config import Conflict, Duration, config, setting
from llmkit.parallel.degrees import Deal, Degrees, check_virtual, deal, degrees
from llmkit.parallel.zero_config import Wanted, generated, given

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


Place = Literal["none", "cpu", "nvme"]
"""Where a part of the state waits: on the device, in the host's memory, or on a disk."""


@config
class Offload:
    """What waits elsewhere than on the device."""

    optimizer: Place = "none"
    """The optimizer's state and its update."""
    params: Place = "none"
    """The weights; stage 3 alone."""
    path: str | None = None
    """A folder on a fast local disk, for `nvme`."""

    def problems(self) -> Iterator[Conflict]:
        """A disk without a folder, or the other way round."""
        disks = [key for key in ("optimizer", "params") if getattr(self, key) == "nvme"]
        if disks and self.path is None:
            yield Conflict("path", f"{disks[0]} goes to a disk, and no folder is named", "give path", disks[0])
        if self.path is not None and not disks:
            yield Conflict("path", "nothing goes to a disk", "set optimizer: nvme, or drop path")


@config
class Zero:
    """DeepSpeed's ZeRO (arXiv:1910.02054): ranks share the optimizer's state, the gradients too, or the weights too.

    Its configuration is made from the recipe, and `llmkit show` prints it. Runs on one process as well, for offload."""

    kind: Literal["zero"] = "zero"
    stage: int = setting(default=3, least=1, most=3)
    """1 shares the optimizer's state, 2 the gradients too, 3 the weights too."""
    offload: Offload = Offload()
    config: str | None = None
    """A DeepSpeed configuration in JSON, in place of the one that is made: what it says must go with the recipe, which
    alone says batch, clipping, optimizer, schedule and precision. `auto` in it stands for what the recipe says."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.stage < 3 and self.offload.params != "none":
            what = f"stage {self.stage} keeps whole weights on every rank"
            yield Conflict("offload.params", what, "set stage: 3", "stage")
        if self.stage < 3 and self.offload.optimizer == "nvme":
            what = f"stage {self.stage} has no optimizer on a disk"
            yield Conflict("offload.optimizer", what, "set stage: 3, or offload.optimizer: cpu", "stage")

    def settings(self, precision: str) -> dict[str, Any]:
        """The DeepSpeed configuration for weights and products of a precision.

        Raises:
            RecipeError: the file of `config` cannot be read, or contradicts the recipe.
        """
        off = self.offload
        wanted = Wanted(self.stage, off.optimizer, off.params, off.path, precision)
        return generated(wanted) if self.config is None else given(self.config, wanted)

    def ready(self, device: str) -> None:
        """Sees to it that DeepSpeed is there, and what it needs for a disk.

        Raises:
            ModelError: DeepSpeed is not installed.
            ResourceError: it cannot reach a disk in the background.
            RecipeError: DeepSpeed does not take what `config` says of ZeRO.
        """
        from llmkit.parallel.zero_engine import check, check_config

        check(device, "nvme" in (self.offload.optimizer, self.offload.params))
        if self.config is not None:
            check_config(self.config, self.settings("fp32"), device)

    def stepper(self, parts: Parts, grid: Grid | None) -> Steps:
        """Parts of a model in training -> what makes its steps."""
        from llmkit.parallel.zero import stepper

        return stepper(parts, grid, self)


Strategy = Auto | Single | Ddp | Fsdp | Zero


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
    context: int = setting(default=1, least=1)
    """Ranks that share every row: each holds a part of its tokens, and attention alone talks."""
    context_method: Literal["auto", "ulysses", "ring"] = "auto"
    """`ulysses` deals attention's heads out, `ring` sends keys and values round; `auto` is `ulysses` where `context`
    divides the heads, else `ring`."""
    pipeline: int = setting(default=1, least=1)
    """Ranks that hold a model's layers one after the other, a stage each; micro-batches go through them (1F1B). Beside
    it go copies alone (`replicate`)."""
    expert: int = setting(default=1, least=1)
    """Ranks that share the experts of a mixture model: each holds as many of every layer's, sees rows of its own, and
    sends their tokens to the experts that the router chose. It must divide the number of experts."""
    patience: Duration = setting(default=600.0, above=0)
    """How long ranks wait for each other to come; and for one that, outside of a step, neither moves nor computes."""
    interface: str = "auto"
    """The network interface that ranks listen at; `auto` is the one on the way to the main rank (`MASTER_ADDR`)."""

    virtual: int = setting(default=8, least=1)
    """With `deterministic`, the fixed shards of a step, a power of two: a run of any number of ranks that divides it
    gives the same bits under `single` and `ddp`, without other degrees."""

    def shards(self, world: int, deterministic: bool) -> int:
        """Virtual shards of a run, or 0 where it has none."""
        return self.virtual if deterministic and self.whole(world) else 0

    def whole(self, world: int) -> bool:
        """Whether every rank holds all of the model as it is, and runs whole rows."""
        alone = self.tensor * self.context * self.pipeline * self.expert == 1
        return alone and self.resolve(world).kind in ("single", "ddp")

    def at_hand(self, world: int) -> bool:
        """Whether every rank has all weights whole in the modules of its model, between steps too."""
        kind = self.resolve(world)
        shared = kind.stage == 3 if isinstance(kind, Zero) else isinstance(kind, Fsdp) and world > 1
        return not shared and self.tensor * self.pipeline * self.expert == 1

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
        inner = (self.context, self.tensor, self.pipeline, self.expert)
        return degrees(world, self.resolve(world).kind, replicate, shard, *inner)

    def resolve(self, world: int) -> Single | Ddp | Fsdp | Zero:
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

    def cut(self, world: int) -> bool:
        """Whether no rank of `world` holds the whole model."""
        kind, made = self.resolve(world), self.degrees(world)
        shared = isinstance(kind, Fsdp) or (isinstance(kind, Zero) and kind.stage == 3)
        return made.tensor * made.expert > 1 or (shared and made.shard * made.context > 1)

    def stepper(self, parts: Parts, grid: Grid | None) -> Steps:
        """Parts of a model in training -> what makes its steps.

        Raises:
            ModelError: the model cannot be cut as `tensor`, `pipeline` or `expert` asks for.
        """
        if grid is not None and grid.degrees.pipeline > 1:
            from llmkit.parallel.pipeline_team import stepper as staged

            return staged(parts, grid)
        strategy = self.resolve(1 if grid is None else grid.degrees.world).stepper
        if grid is None or grid.degrees.tensor * grid.degrees.expert == 1:
            return strategy(parts, grid)
        if grid.degrees.expert > 1:
            from llmkit.parallel.expert_team import stepper as by_experts

            return by_experts(parts, grid, strategy)
        from llmkit.parallel.tensor_team import stepper

        return stepper(parts, grid, strategy)

    def join(
        self, ranks: Ranks, device: str, facts: Mapping[str, Any], aside: int = 0
    ) -> AbstractContextManager[Group]:
        """The group of all ranks, until the end, of which the last `aside` do not train; `facts` are what they must
        share.

        Raises:
            PeerError: they do not come together, or differ.
        """
        from llmkit.parallel.group import joined

        return joined(ranks, device, self.patience, self.interface, facts, aside=aside)
