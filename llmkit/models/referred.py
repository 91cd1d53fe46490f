"""A policy with its reference as one module: what a strategy runs gives the log-probabilities of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch, Needs, Referenced
from llmkit.models.heads import Scored


class Referred(Scored):
    """A model in training beside what it was: itself without its adapter, or a second model that stays as it is."""

    def __init__(self, policy: Scored, reference: Scored | None = None) -> None:
        """Without `reference`, the policy's adapter is put aside for it."""
        super().__init__(policy.model, policy.words)
        self.second = [] if reference is None else [reference]  # in a list: a strategy neither cuts nor copies it

    def forward(self, batch: Batch, needs: Needs = Needs()) -> Any:
        """`Referenced`; the reference comes first, so that what it takes is free when the policy's activations are."""
        reference = self.reference(batch, Needs(temperature=needs.temperature))
        return Referenced(super().forward(batch, needs), reference)

    def reference(self, batch: Batch, needs: Needs = Needs()) -> Tensor:
        """The reference's log-probabilities, (N,), without dropout or gradient."""
        with torch.no_grad():
            if self.second:
                return cast(Tensor, self.second[0](batch, needs))
            with resting(self), without_adapter(self.model):  # this module itself asks its mode for noise
                return cast(Tensor, super().forward(batch, needs))


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """No dropout and no noise; each module is in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The model as it is below its adapter; what is trained of it stays so, which peft would set by itself.

    Raises:
        ValueError: it has no adapter.
    """
    if not hasattr(model, "disable_adapter"):
        raise ValueError("a model without an adapter has nothing below it")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
