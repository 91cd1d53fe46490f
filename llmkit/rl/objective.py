"""A loss over rollouts: it sees to it that the policy begins at itself, and logs what was drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from llmkit.core.errors import ModelError
from llmkit.core.types import Batch, Entropic, LossSum, Needs, Valued
from llmkit.losses.policy import NONE
from llmkit.losses.policy_node import PolicyLoss
from llmkit.losses.ppo_node import PpoLoss

CLOSE = 1e-6
"""How far the ratio of a policy to itself may be from 1, in fp32: what makes both is one forward."""
CLOSE_HALF = 0.05
"""In 16 bits, where a kernel may round otherwise when nobody asks for gradients."""
SERVED = 0.25
"""How far a server's log-probabilities of what it drew may be from the trainer's, in the mean over a micro-batch: so
wide that other kernels and 16 bits pass, which importance weights are for."""
SILENT = ("advantage", "close", "drawn_close", "served_close")


@dataclass(frozen=True)
class OverRollouts:
    """The stage's loss."""

    loss: PolicyLoss | PpoLoss
    temperature: float

    @property
    def needs(self) -> Needs:
        """What it reads of the head: of the law that was drawn from."""
        return replace(self.loss.needs, temperature=self.temperature)

    def __call__(self, scores: Any, batch: Batch) -> LossSum:
        """The loss itself, with figures of the rollouts.

        Raises:
            ModelError: the policy before its first update is not the one whose log-probabilities are held.
        """
        branches = batch.branches
        if branches is None:
            raise ValueError("rollouts without their completions")
        policy = scores.policy if isinstance(scores, Valued) else scores
        logps = (policy.logps if isinstance(policy, Entropic) else policy).detach()
        check(logps, batch)
        made = self.loss(scores, batch)
        n = torch.tensor(len(branches.group) or NONE)
        told = {name: (x.double().sum(), n) for name, x in branches.per.items() if name not in SILENT}
        return LossSum(made.total, made.count, {**made.extras, **told, **engine_gap(logps, batch)})


def fresh(batch: Batch, name: str = "close") -> float:
    """How far the policy may be from the one before its updates (or, `drawn_close`, from the one that drew): 0 once it
    was updated since."""
    per = batch.branches.per if batch.branches is not None else {}
    return float(per[name].min()) if name in per and len(per[name]) else 0.0


def check(logps: torch.Tensor, batch: Batch) -> None:
    """Raises: ModelError when a policy that was not updated yet differs from itself."""
    ways = {"old": ("close", "reuse", "1"), "behaviour": ("drawn_close", "asynchronous", "0")}
    for name, (bound, key, plain) in ways.items():
        close, branches = fresh(batch, bound), batch.branches
        if branches is None or not close or name not in branches.each or not len(logps):
            continue
        off = float(torch.expm1(logps - branches.each[name]).abs().max())
        if off > close:
            what = f"the ratio of the policy to itself is off by {off:.2g} before its first update"
            fix = f"set rollout.{key}={plain}, where it is 1 by construction"
            raise ModelError(what, fix=fix, key=f"rollout.{key}")


def engine_gap(logps: torch.Tensor, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """How far the engine's log-probabilities of what it drew are from the trainer's, where both are of one policy.

    Raises:
        ModelError: a server's are those of another model, or of other weights.
    """
    branches = batch.branches
    if branches is None or "engine" not in branches.each or not fresh(batch):
        return {}
    told = branches.each["engine"]
    if "drawn_close" in branches.per:
        logps = branches.each["behaviour"]
    known = torch.isfinite(told)
    gap = torch.where(known, (told - logps).abs(), 0.0).double().sum()
    count, bound = known.double().sum().clamp_min(NONE), fresh(batch, "served_close")
    off = float(gap / count)
    if bound and off > bound:
        what = f"the server's log-probabilities are off by {off:.2g} in the mean from those of the model in training"
        raise ModelError(what, fix="serve the run's own model, at its precision or nearly so", key="rollout.vllm")
    return {"engine_gap": (gap, count)}
