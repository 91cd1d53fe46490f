"""The stepper of one process on one device: the meaning that every other strategy must equal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from llmkit.core.errors import ResourceError
from llmkit.core.types import Batch, LossSum, Needs
from llmkit.parallel.offload import Offload
from llmkit.parallel.optimizers import Optimizers
from llmkit.parallel.scaler import Scaler


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


class Single:
    """Accumulates the gradient of one global batch, then applies it."""

    def __init__(
        self,
        scored: nn.Module,
        params: Mapping[str, nn.Parameter],
        optimizer: Optimizers | torch.optim.Optimizer,
        ways: Ways = Ways(),
    ) -> None:
        self.scored, self.params, self.ways = scored, dict(params), ways
        self.optimizer = optimizer if isinstance(optimizer, Optimizers) else Optimizers([optimizer])
        self.squares: float | Tensor = 0.0
        """Of the norms of gradients that the backward pass has used up."""
        if ways.in_backward:
            for p in self.params.values():
                p.register_post_accumulate_grad_hook(self._update)

    def autocast(self) -> AbstractContextManager[Any]:
        """The compute precision: mixed, or that of the parameters."""
        if self.ways.compute is None:
            return nullcontext()
        device = next(iter(self.params.values())).device.type
        return torch.autocast(device, dtype=self.ways.compute)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are those that an evaluation and the result see."""
        return self.optimizer.averaged()

    def settle(self) -> None:
        """After the last step: the weights are those of the result for good."""
        self.optimizer.settle()

    def rate(self, factor: float) -> None:
        """Sets the rates of the step that comes to `factor` times their own."""
        self.optimizer.rate(factor)

    def accumulate(self, batches: Iterable[Batch], loss: Loss, count: float) -> LossSum:
        """Adds the gradients of sum(loss) / count, micro-batch by micro-batch; `count` is the global batch's.

        Raises:
            ResourceError: parameters are updated in the backward pass, and there is more than one.
        """
        total, seen, scaler = 0.0, 0.0, self.ways.scaler
        needs = getattr(loss, "needs", PLAIN)
        extras: dict[str, tuple[Tensor, Tensor]] = {}
        self.squares = 0.0
        for index, batch in enumerate(batches):
            if index and self.ways.in_backward:
                what = "the step takes more than one micro-batch, and memory.optimizer_in_backward updates after each"
                raise ResourceError(what, fix="raise micro_batch, or lower batch.rows", key="micro_batch")
            with self._keeping(), self.autocast():
                scores = self.scored(batch) if needs == PLAIN else self.scored(batch, needs)
            part = loss(scores, batch)
            (part.total / count * (scaler.scale if scaler else 1.0)).backward()
            total += float(part.total.detach())
            seen += float(part.count)
            for name, (top, bottom) in part.extras.items():
                before = extras.get(name, (torch.zeros(()), torch.zeros(())))
                extras[name] = (before[0] + top.detach().cpu(), before[1] + bottom.detach().cpu())
        if scaler:
            extras["loss_scale"] = (torch.tensor(scaler.scale), torch.ones(()))
            self._scale(1 / scaler.scale)
        return LossSum(torch.tensor(total, dtype=torch.float64), torch.tensor(seen, dtype=torch.float64), extras)

    def _keeping(self) -> AbstractContextManager[Any]:
        return self.ways.offload.keeping() if self.ways.offload else nullcontext()

    def _update(self, p: Tensor) -> None:
        if p.grad is not None and isinstance(p, nn.Parameter):
            self.squares = self.squares + p.grad.detach().float().norm().square()
            self.optimizer.step_alone(p)
            p.grad = None

    def _scale(self, factor: float) -> None:
        if grads := [p.grad for p in self.params.values() if p.grad is not None]:
            torch._foreach_mul_(grads, factor)

    def grad_norm(self) -> float:
        """The norm of all gradients together."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        left = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        return math.hypot(left, math.sqrt(self.squares))

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

    def state(self) -> dict[str, Tensor]:
        """Trained parameters as `param/NAME`, the optimizer's state as `optim/NAME/KEY`, fp16's factor; not copied."""
        tensors = {f"param/{name}": p.detach() for name, p in self.params.items()}
        tensors |= {f"optim/{key}": value for key, value in self.optimizer.state(self.params).items()}
        if scaler := self.ways.scaler:
            tensors |= {"scaler/scale": torch.tensor(scaler.scale), "scaler/good": torch.tensor(scaler.good)}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(tensors[f"param/{name}"])
        mine = {key.removeprefix("optim/"): value for key, value in tensors.items() if key.startswith("optim/")}
        self.optimizer.load(self.params, mine)
        if (scaler := self.ways.scaler) and "scaler/scale" in tensors:
            scaler.scale, scaler.good = float(tensors["scaler/scale"]), int(tensors["scaler/good"])
