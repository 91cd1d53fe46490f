"""A policy with its critic as one module: what a strategy runs gives the policy's scores and the critic's values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch, Needs, Scores, Valued
from llmkit.models.heads import Headed, Scored


class ValueHead(nn.Module):
    """One number of a hidden state, in fp32 at least."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` (1, H) is what it begins with."""
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N,)."""
        with torch.autocast(hidden.device.type, enabled=False):
            kind = torch.promote_types(hidden.dtype, self.weight.dtype)
            return nn.functional.linear(hidden.to(kind), self.weight.to(kind))[:, 0]


class Critic(nn.Module):
    """What values states: a head over the policy's own hidden states, or over those of a model of its own."""

    def __init__(self, head: ValueHead, own: nn.Module | None = None) -> None:
        super().__init__()
        self.head = head
        self.own = None if own is None else Headed(own)

    def forward(self, batch: Batch, policy: Tensor) -> Tensor:
        """The value before each token that has a weight is drawn, (N,); `policy`: the policy's hidden states."""
        hidden = policy if self.own is None else self.own.hidden(batch)
        value: Tensor = self.head(hidden[batch.weights != 0])
        return value


class Criticised(Scored):
    """A policy beside its critic. Values are of the states before tokens: the first one is read at the prompt's last
    token."""

    def __init__(self, policy: Scored, critic: Critic) -> None:
        super().__init__(policy.model, policy.words)
        self.critic = critic

    def forward(self, batch: Batch, needs: Needs = Needs()) -> Any:
        """What the policy says, and where it is asked for what the critic says."""
        hidden = self.hidden(batch)
        scores = self.read(hidden, batch, needs)
        if not needs.values:
            return scores
        if isinstance(scores, Scores):
            raise TypeError("values stand beside the log-probabilities of what was drawn")
        return Valued(scores, self.critic(batch, hidden))


def twin(model: nn.Module) -> Any:
    """A second model over the same weights, each held once; without the adapter of the first, if that has one. What is
    put on it then is its own. Modules that have frozen weights and no others are those of the first: a strategy that
    cuts these weights changes what such a module holds."""
    frozen = [module for module in model.modules() if _frozen(module)]
    memo = {id(held): held for held in (*model.parameters(), *model.buffers(), *frozen)}
    made: Any = copy.deepcopy(model, memo)
    return made.unload() if hasattr(made, "unload") else made


def _frozen(module: nn.Module) -> bool:
    held = list(module.parameters(recurse=False))
    return bool(held) and not any(p.requires_grad for p in held) and not list(module.children())
