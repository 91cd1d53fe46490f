"""The stepper of one process on one device: the meaning that every other strategy must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch, LossSum

Loss = Callable[[Any, Batch], LossSum]
"""What the scored model gives for a batch, and the batch -> a sum with its count."""


class Single:
    """Accumulates the gradient of one global batch, then applies it."""

    def __init__(
        self,
        scored: nn.Module,
        params: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        compute: torch.dtype | None = None,
    ) -> None:
        self.scored, self.params, self.optimizer, self.compute = scored, dict(params), optimizer, compute
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def autocast(self) -> AbstractContextManager[Any]:
        """The compute precision: mixed, or that of the parameters."""
        if self.compute is None:
            return nullcontext()
        device = next(iter(self.params.values())).device.type
        return torch.autocast(device, dtype=self.compute)

    def accumulate(self, batches: Iterable[Batch], loss: Loss, count: float) -> LossSum:
        """Adds the gradients of sum(loss) / count, micro-batch by micro-batch; `count` is the global batch's."""
        total, seen = 0.0, 0.0
        extras: dict[str, tuple[Tensor, Tensor]] = {}
        for batch in batches:
            with self.autocast():
                scores = self.scored(batch)
            part = loss(scores, batch)
            (part.total / count).backward()
            total += float(part.total.detach())
            seen += float(part.count)
            for name, (top, bottom) in part.extras.items():
                before = extras.get(name, (torch.zeros(()), torch.zeros(())))
                extras[name] = (before[0] + top.detach().cpu(), before[1] + bottom.detach().cpu())
        return LossSum(torch.tensor(total, dtype=torch.float64), torch.tensor(seen, dtype=torch.float64), extras)

    def grad_norm(self) -> float:
        """The norm of all gradients together."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0

    def step(self, factor: float, clip: float, norm: float) -> None:
        """Applies the gradients at `factor` times the rate, scaled down to norm `clip` (0: as they are)."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if clip and norm > clip:
            torch._foreach_mul_([p.grad for p in self.params.values() if p.grad is not None], clip / (norm + 1e-6))
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Forgets the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Trained parameters as `param/NAME` and the optimizer's state as `optim/NAME/KEY`, none of it copied."""
        tensors = {f"param/{name}": p.detach() for name, p in self.params.items()}
        for name, p in self.params.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                held = value if isinstance(value, Tensor) else torch.tensor(value)
                tensors[f"optim/{name}/{key}"] = held.detach()
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(tensors[f"param/{name}"])
        for name, p in self.params.items():
            prefix = f"optim/{name}/"
            mine = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            if mine:
                self.optimizer.state[p] = {key: self._held(key, value, p) for key, value in mine.items()}

    def _held(self, key: str, value: Tensor, p: nn.Parameter) -> Any:
        """A state entry as the optimizer keeps it: bitsandbytes counts steps in a plain int, torch in a tensor, which
        lies beside the parameter where the device itself reads it."""
        if key != "step":
            return value.to(p.device, copy=True)
        if not isinstance(self.optimizer, torch.optim.AdamW):
            return int(value)
        settings = self.optimizer.defaults
        return value.to(p.device if settings["fused"] or settings["capturable"] else "cpu", copy=True)
