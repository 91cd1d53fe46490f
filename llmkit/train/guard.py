"""What happens when a loss or a gradient is not finite, or far above its median."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from llmkit.core.errors import ResourceError
from llmkit.train.node import Guard

WINDOW = 100
FEWEST = 10
"""A median of fewer losses than this judges nobody."""
STREAK = 3
"""Skipped steps in a row that stop a run under every policy."""


@dataclass(frozen=True)
class Watch:
    """What the guard remembers: the last finite losses, and how many steps in a row were skipped."""

    losses: tuple[float, ...] = ()
    streak: int = 0

    def trouble(self, guard: Guard, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, in words, or nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if guard.spike and len(self.losses) >= FEWEST:
            middle = median(self.losses)
            if 0 < guard.spike * middle < loss:  # some losses of preference are below 0
                return f"the loss {loss:.4g} is {loss / middle:.1f} times its median {middle:.4g}"
        return ""

    def judge(self, guard: Guard, step: int, loss: float, grad_norm: float, samples: str) -> tuple[bool, Watch]:
        """Whether the step may be applied, and what to remember; `samples` says what it saw.

        Raises:
            ResourceError: the policy is to stop, or too many steps in a row were skipped.
        """
        trouble = self.trouble(guard, loss, grad_norm)
        if not trouble:
            return True, Watch((*self.losses, loss)[-WINDOW:], 0)
        if guard.nonfinite == "skip" and self.streak + 1 < STREAK:
            return False, replace(self, streak=self.streak + 1)
        raise ResourceError(f"step {step}: {trouble}; {samples}", key="guard.nonfinite", fix=self._fix(guard))

    def _fix(self, guard: Guard) -> str:
        if guard.nonfinite == "skip":
            return f"{STREAK} steps in a row were skipped: lower optim.lr, or take the samples out"
        return "lower optim.lr, take the samples out, or set guard.nonfinite=skip; the last checkpoint is untouched"


def judge_evaluation(guard: Guard, step: int, figures: Mapping[str, float]) -> None:
    """Sees to it that an evaluation's loss is a number.

    Raises:
        ResourceError: it is not finite, and the policy is to stop.
    """
    loss = figures.get("valid.loss", 0.0)
    if guard.nonfinite == "stop" and not math.isfinite(loss):
        fix = "lower optim.lr, mend data.valid, or set guard.nonfinite=skip; the last checkpoint is untouched"
        raise ResourceError(f"step {step}: valid.loss is {loss}", key="guard.nonfinite", fix=fix)


def named(ids: Sequence[int], places: Sequence[tuple[str, int]]) -> str:
    """The samples of a step: their ids, and the file and the lines of their rows where they came from any."""
    lines: dict[str, list[int]] = {}
    for file, line in places:
        lines.setdefault(file, []).append(line)
    rows = "".join(f", rows {file}:{_some(sorted(set(found)))}" for file, found in lines.items())
    return f"sample ids {_some(ids)}{rows}"


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:16]))
    return f"{shown} and {len(numbers) - 16} more" if len(numbers) > 16 else shown
