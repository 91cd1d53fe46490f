"""The stepper: how one process makes and applies the gradients of a step, alone or in a team."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from llmkit.core.deferred import Deferred
from llmkit.core.errors import ResourceError
from llmkit.core.peers import Peers
from llmkit.core.sliced import Slice
from llmkit.core.types import Batch, LossSum, Needs
from llmkit.parallel.offload import Offload
from llmkit.parallel.optimizers import Optimizers
from llmkit.parallel.scaler import Scaler
from llmkit.parallel.team import Solo, Sums, Team, squares, summed


class Loss(Protocol):
    """What is made small; an attribute `needs` says what it reads of the head beside log-probabilities."""

    def __call__(self, scores: Any, batch: Batch, /) -> LossSum:
        """What the scored model gives for a batch, and the batch -> a sum with its count."""
        ...


PLAIN = Needs()


@runtime_checkable
class Adaptive(Protocol):
    """A loss that learns from step to step; what it keeps goes into the checkpoint."""

    def begin(self, ids: Iterable[int]) -> None:
        """A step begins, over these examples."""
        ...

    def update(self, sums: LossSum) -> None:
        """The step was applied; these were its sums."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it keeps, by names that begin with `loss/`."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        ...


@dataclass(frozen=True)
class Ways:
    """How the stepper computes, beside the plain way."""

    compute: torch.dtype | None = None
    """Of products under autocast; that of the parameters without it."""
    scaler: Scaler | None = None
    """Of the loss, in fp16."""
    in_backward: bool = False
    """Each parameter is updated as soon as its gradient is whole, which is then gone."""
    offload: Offload | None = None
    """What the forward keeps waits on the host."""
    device: str = ""
    """Where it computes; where the parameters lie, if nothing is said."""
    split: Callable[[Batch], Batch] | None = None
    """Of a micro-batch whose rows several ranks hold, this rank's part."""


@dataclass(frozen=True)
class Parts:
    """What a strategy makes a stepper of."""

    scored: nn.Module
    """The model with its head: all that reads weights happens in its forward."""
    params: Mapping[str, nn.Parameter]
    """Those that are trained."""
    optimizer: Callable[..., Optimizers]
    """Over the parameters as the strategy holds them, by name; `among` all that are trained, where those are not."""
    ways: Ways = Ways()
    virtual: int = 0
    """Shards of a step whose gradients are added up in one fixed order, whatever the number of ranks; 0 for none."""
    layers: tuple[nn.Module, ...] = ()
    """The layers of the model, from the first to the last: what is gathered and given up together."""
    twins: Sequence[tuple[nn.Module, nn.Module]] = ()
    """Layers with an adapter of their own that run the frozen weights of another layer, each with that one."""
    base: nn.Module | None = None
    """The model of transformers, inside of its adapter."""
    plan: Mapping[str, str] = field(default_factory=dict)
    """How transformers cuts it for tensor parallelism: globs over modules and parameters -> names of styles."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """The same for expert parallelism."""
    say: Callable[[str], None] = lambda _: None
    """Tells the user what was decided, in one line."""
    deferred: Deferred = field(default_factory=Deferred)
    """Weights that are still in their files: a strategy reads each layer when it cuts it, or all of them (`fill`)."""


class Steps:
    """Accumulates the gradient of one global batch, then applies it; alone (`Solo`) it is the meaning that every other
    team must equal."""

    def __init__(
        self,
        scored: nn.Module,
        params: Mapping[str, nn.Parameter],
        optimizer: Optimizers | torch.optim.Optimizer,
        ways: Ways = Ways(),
        team: Team | None = None,
    ) -> None:
        self.scored, self.params, self.ways = scored, dict(params), ways
        self.team: Team = team or Solo()
        self.optimizer = optimizer if isinstance(optimizer, Optimizers) else Optimizers([optimizer])
        self.squares: float | Tensor = 0.0
        """Of the norms of gradients that the backward pass has used up."""
        if ways.in_backward:
            for p in self.params.values():
                p.register_post_accumulate_grad_hook(self._update)

    def autocast(self) -> AbstractContextManager[Any]:
        """The compute precision: mixed, or that of the parameters."""
        return autocast(self.ways, self.params)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are those that an evaluation and the result see."""
        return self.optimizer.averaged()

    def settle(self) -> None:
        """After the last step: the weights are those of the result for good."""
        self.optimizer.settle()

    def rate(self, factor: float) -> None:
        """Sets the rates of the step that comes to `factor` times their own."""
        self.optimizer.rate(factor)

    def accumulate(self, batches: Iterable[Batch], loss: Loss, count: float, turns: int = 1) -> LossSum:
        """Adds the gradients of sum(loss) / count, micro-batch by micro-batch, `turns` of them on every rank; `count`
        is the global batch's, and so are the sums that this gives.

        Raises:
            ResourceError: parameters are updated in the backward pass, and there is more than one.
        """
        scaler, parts = self.ways.scaler, list[LossSum]()
        needs = getattr(loss, "needs", PLAIN)
        self.squares = 0.0
        for index, batch in enumerate(batches):
            if index and self.ways.in_backward:
                what = "the step takes more than one micro-batch, and memory.optimizer_in_backward updates after each"
                raise ResourceError(what, fix="raise micro_batch, or lower batch.rows", key="micro_batch")
            if self.ways.split is not None:
                batch = self.ways.split(batch)
            with self.team.around(index, turns):
                with self._keeping(), self.autocast():
                    scores = self.scored(batch) if needs == PLAIN else self.scored(batch, needs)
                part = loss(scores, batch)
                (part.total / count * (scaler.scale if scaler else 1.0)).backward()
            self.team.after(index, turns)
            parts.append(detached(part))
        return self.sums(summed(numbers(parts)))

    def sums(self, own: Sums) -> LossSum:
        """The sums of all ranks, after the last micro-batch: the gradients are then those of the loss itself."""
        scaler, whole = self.ways.scaler, self.team.totals(own)
        extras = {name: (wide(a), wide(b)) for name, (a, b) in whole.items() if name}
        if scaler:
            extras["loss_scale"] = (torch.tensor(scaler.scale), torch.ones(()))
            self._scale(1 / scaler.scale)
        total, seen = whole.get("", (0.0, 0.0))
        return LossSum(wide(total), wide(seen), extras)

    def assemble(self, models: Sequence[nn.Module], peers: Peers) -> None:
        """When all is trained and measured: the weights of models are whole on the main rank, as they are exported.
        Nothing runs them after it."""
        for model in models:
            self.team.assemble(model, peers)

    def _keeping(self) -> AbstractContextManager[Any]:
        return self.ways.offload.keeping() if self.ways.offload else nullcontext()

    def _update(self, p: Tensor) -> None:
        if p.grad is not None and isinstance(p, nn.Parameter):
            self.squares = self.squares + squares(p.grad)
            self.optimizer.step_alone(p)
            p.grad = None

    def _scale(self, factor: float) -> None:
        if grads := [p.grad for p in self.params.values() if p.grad is not None]:
            torch._foreach_mul_(grads, factor)

    def grad_norm(self) -> float:
        """The norm of all gradients together."""
        return math.hypot(self.team.norm(self.params), math.sqrt(self.squares))

    def overflowed(self) -> bool:
        """Whether gradients that are not finite may be fp16's fault: the loss's factor is halved then.

        Raises:
            ResourceError: no factor is left.
        """
        if self.ways.scaler is None:
            return False
        self.ways.scaler.halve()
        return True

    def step(self, factor: float, clip: float, norm: float) -> None:
        """Applies the gradients at `factor` times the rate, scaled down to norm `clip` (0: as they are)."""
        if not self.ways.in_backward:
            self.rate(factor)
            if clip and norm > clip:
                self._scale(clip / (norm + 1e-6))
            self.optimizer.step()
        if self.ways.scaler:
            self.ways.scaler.fine()
        self.drop()

    def drop(self) -> None:
        """Forgets the gradients."""
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor | Slice]:
        """What this rank holds of trained parameters as `param/NAME`, of the optimizer's state as `optim/NAME/KEY`, and
        fp16's factor; not copied."""
        tensors = {f"param/{name}": self.team.part(name, p, p.detach()) for name, p in self.params.items()}
        for key, value in self.optimizer.state(self.params).items():
            name = key.partition("/")[0]
            tensors[f"optim/{key}"] = self.team.part(name, self.params[name], value)
        if scaler := self.ways.scaler:
            tensors |= {"scaler/scale": torch.tensor(scaler.scale), "scaler/good": torch.tensor(scaler.good)}
        return tensors

    def lying(self, name: str) -> Sequence[Slice]:
        """What this rank holds of a trained parameter."""
        return self.team.lying(name, self.params[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(self.team.own(name, p, tensors[f"param/{name}"]))
        mine = {}
        for key in (key.removeprefix("optim/") for key in tensors if key.startswith("optim/")):
            if (name := key.partition("/")[0]) in self.params:  # others are of other stages
                mine[key] = self.team.own(name, self.params[name], tensors[f"optim/{key}"])
        self.optimizer.load(self.params, mine)
        if (scaler := self.ways.scaler) and "scaler/scale" in tensors:
            scaler.scale, scaler.good = float(tensors["scaler/scale"]), int(tensors["scaler/good"])


def autocast(ways: Ways, params: Mapping[str, nn.Parameter]) -> AbstractContextManager[Any]:
    """The compute precision of a model: mixed, or that of its parameters."""
    if ways.compute is None:
        return nullcontext()
    return torch.autocast(ways.device or next(iter(params.values())).device.type, dtype=ways.compute)


def wide(number: float) -> Tensor:
    """A sum as wide as it was counted: figures may be of any size."""
    return torch.tensor(number, dtype=torch.float64)


def detached(part: LossSum) -> LossSum:
    """The same sums without what they were made of."""
    extras = {name: (top.detach(), bottom.detach()) for name, (top, bottom) in part.extras.items()}
    return LossSum(part.total.detach(), part.count.detach(), extras)


def numbers(parts: Sequence[LossSum]) -> list[Sums]:
    """The sums of micro-batches by name, each (sum, count); the loss itself has no name. All come over from a device in
    one transfer: it is waited for once a step, not after each micro-batch."""
    pairs = [{"": (part.total, part.count), **part.extras} for part in parts]
    flat = [number.double().reshape(1) for one in pairs for pair in one.values() for number in pair]
    values = iter(torch.cat([number.to(flat[0].device) for number in flat]).tolist() if flat else [])
    return [{name: (next(values), next(values)) for name in one} for one in pairs]
