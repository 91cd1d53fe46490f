"""What a model says of completions that are good or bad each by itself: losses, figures, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from llmkit.core.records import Prediction
from llmkit.core.types import Report
from llmkit.data.groups import Groups
from llmkit.data.mismatched import mismatched
from llmkit.evals.preferences import Figures, judged, laid_out
from llmkit.evals.run import Subject, at_rest, record
from llmkit.losses.kto import Unpaired, baseline, distance
from llmkit.stats.bootstrap import ratio


def found(subject: Subject, loss: Unpaired, rows: Groups, ids: Sequence[int], capacity: int) -> Figures:
    """The losses and figures of these completions, with the baseline of all of them together."""
    z = _baseline(subject, rows, ids, capacity) if loss.loss.needs_baseline and len(ids) > 1 else 0.0
    return judged(subject, replace(loss, baseline=z), rows, ids, capacity)


def _baseline(subject: Subject, rows: Groups, ids: Sequence[int], capacity: int) -> float:
    odd, sums = mismatched(rows, ids, capacity), [0.0, 0.0]
    with at_rest(subject):
        for batch in laid_out(subject, odd, range(len(odd)), capacity):
            subject.check("in evaluation")
            with torch.no_grad(), subject.autocast():
                said = subject.scored(batch)
            sums = [a + float(b) for a, b in zip(sums, distance(said.policy, said.reference, batch), strict=True)]
    if subject.share.count > 1:
        sums = [sum(column) for column in zip(*subject.share.gather(sums), strict=True)]
    return baseline(*sums)


def rated(subject: Subject, loss: Unpaired, rows: Groups, ids: Sequence[int], capacity: int) -> dict[str, float]:
    """The figures (`valid.*`) of these completions; rewards are means of the good and of the bad ones."""
    seen = found(subject, loss, rows, ids, capacity)
    good = seen["label"] > 0.5
    sides = {"chosen": good, "rejected": ~good}
    made = {name: float(seen[name].mean()) for name in ("loss", "accuracy", "length")}
    for side, which in ((side, which) for side, which in sides.items() if which.any()):
        made |= {f"{name}_{side}": float(seen[name][which].mean()) for name in ("reward", "logps")}
    if good.any() and not good.all():
        made["reward_margin"] = made["reward_chosen"] - made["reward_rejected"]
    return {f"valid.{name}": value for name, value in made.items()}


def concluded(
    subject: Subject, loss: Unpaired, rows: Groups, ids: Sequence[int], capacity: int
) -> tuple[list[Prediction], list[Report]]:
    """A table of the completions, each with its reward, and the figures with their intervals."""
    seen = found(subject, loss, rows, ids, capacity)
    table = [_line(subject, rows, i, {n: float(x[at]) for n, x in seen.items()}) for at, i in enumerate(ids)]
    clusters = [rows.rows[i].cluster for i in ids]
    names = ("loss", "accuracy")
    return table, [ratio(f"valid.{name}", seen[name], None, clusters, seed=subject.seed) for name in names]


def _line(subject: Subject, rows: Groups, index: int, scores: dict[str, float]) -> Prediction:
    """A completion: what it is by its row, and by the model."""
    begin, ((border, _),) = int(rows.starts[index]), rows.completions(index)
    ids = np.asarray(rows.ids)
    label, right = scores["label"] > 0.5, scores["accuracy"] > 0.5
    said = "good" if label == right else "bad"
    made = record(
        subject, "valid", rows.rows[index], ids[begin:border].tolist(), scores, said, "good" if label else "bad"
    )
    return replace(made, slices={**made.slices, "kind": "classification"})  # good and bad ones, as two classes
