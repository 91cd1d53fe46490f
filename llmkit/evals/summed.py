"""A loss that is a sum of its own, and all that it tells beside, over rows that are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmkit.core.types import Batch, LossSum
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit, NoPacking, Packing
from llmkit.data.prepare import Prepared
from llmkit.evals.run import FORWARD_TOKENS, Subject, at_rest

Loss = Callable[[Any, Batch], LossSum]


def held_out_sums(
    subject: Subject,
    loss: Loss,
    valid: Prepared,
    ids: Sequence[int],
    capacity: int,
    seen: Callable[[Any], None] = lambda _: None,
) -> dict[str, float]:
    """`valid.loss`, each of its extras, and `valid.tokens`; `seen` is told what the model gives for each batch."""
    sums, packed = list[LossSum](), subject.packed
    packing: Packing = FirstFit() if packed else NoPacking()
    rows = max(1, FORWARD_TOKENS // capacity) if packed else 4
    with at_rest(subject), torch.no_grad():
        for batch in micro_batches(valid, ids, packing, capacity, rows, packed, subject.device):
            subject.check("in evaluation")
            with subject.autocast():
                made = subject.scored(batch)
                seen(made)
                sums.append(loss(made, batch))
    count = sum(float(part.count) for part in sums)
    figures = {"valid.loss": sum(float(part.total) for part in sums) / max(count, 1e-9)}
    for name in dict.fromkeys(name for part in sums for name in part.extras):  # not every batch tells every figure
        pairs = [part.extras[name] for part in sums if name in part.extras]
        figures[f"valid.{name}"] = sum(float(top) for top, _ in pairs) / max(1e-9, sum(float(low) for _, low in pairs))
    return figures | {"valid.tokens": count}
