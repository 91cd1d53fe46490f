"""GaLore (arXiv:2403.03507) and APOLLO (arXiv:2412.05270), written from the papers.

Both hold the moments of a matrix's gradient in `rank` dimensions of its shorter side. GaLore takes the gradient's
leading singular vectors and carries AdamW's step back from them. APOLLO takes random directions and only asks there how
much AdamW would scale each channel of the gradient, which then goes in whole. All that is kept are tensors and a count:
the libraries that there are keep projector objects, which a checkpoint without pickle cannot hold.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

GROWTH = 1.01
"""The norm of APOLLO's update grows at most by this factor from step to step."""


class LowRank(Optimizer):
    """AdamW over matrices whose moments live in `rank` dimensions; `by_channel`: APOLLO, else GaLore."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rank: int,
        every: int,
        scale: float,
        by_channel: bool,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.betas, self.eps, self.rank, self.every, self.scale = betas, eps, rank, every, scale
        self.by_channel = by_channel

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch has overloads that return a loss, which nobody asks for
        """Applies the gradients."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = self._update(p, self.state[p])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.to(p.dtype), alpha=group["lr"])

    def _update(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        wide = p.shape[0] < p.shape[1]
        gradient = cast(Tensor, p.grad).float()
        gradient = gradient if wide else gradient.T  # (short, long)
        count = state.get("count", 0)
        if count % self.every == 0 or "projection" not in state:
            state["projection"] = self._projection(gradient, count // self.every)
        low = state["projection"] @ gradient  # (rank, long)
        step = self._adam(low, state, count + 1)
        update = self._scaled(gradient, low, step, state) if self.by_channel else state["projection"].T @ step
        state["count"] = count + 1
        return cast(Tensor, self.scale * (update if wide else update.T))

    def _projection(self, gradient: Tensor, turn: int) -> Tensor:
        """(rank, short): leading left singular vectors, or a Gaussian that depends on the turn and the shape alone."""
        if not self.by_channel:
            left: Tensor = torch.linalg.svd(gradient, full_matrices=False)[0]
            return left[:, : self.rank].T.contiguous()
        generator = torch.Generator(gradient.device).manual_seed(turn)
        drawn = torch.randn(self.rank, len(gradient), generator=generator, device=gradient.device)
        return drawn / float(self.rank**0.5)

    def _adam(self, low: Tensor, state: dict[str, Any], count: int) -> Tensor:
        """AdamW's step, its moments taken from one projection to the next as they are."""
        first, second = self.betas
        mean = state.setdefault("mean", torch.zeros_like(low)).lerp_(low, 1 - first)
        square = state.setdefault("square", torch.zeros_like(low)).mul_(second).addcmul_(low, low, value=1 - second)
        root = (square / (1 - second**count)).sqrt_().add_(self.eps)
        return cast(Tensor, mean / (1 - first**count) / root)

    def _scaled(self, gradient: Tensor, low: Tensor, step: Tensor, state: dict[str, Any]) -> Tensor:
        """The gradient with each channel scaled as AdamW's step is to what it came from, its growth bounded."""
        update = gradient * (step.norm(dim=0) / low.norm(dim=0).clamp_(min=1e-30))
        norm = update.norm()
        if "norm" in state:
            most = GROWTH * state["norm"]
            shrink = torch.where((norm > most) & (most > 0), most / norm, torch.ones_like(norm))
            update, norm = update * shrink, norm * shrink
        state["norm"] = norm
        return cast(Tensor, update)
