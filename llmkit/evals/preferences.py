"""What a model prefers of validation pairs: the losses and figures of a preference stage, and a table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from llmkit.core.records import Prediction
from llmkit.core.types import Batch, Report
from llmkit.data.batches import micro_batches
from llmkit.data.groups import Groups
from llmkit.data.node import FirstFit, NoPacking, Packing
from llmkit.evals.pair_figures import Pairs, figures, reports
from llmkit.evals.run import FORWARD_TOKENS, Subject, at_rest, record
from llmkit.losses.kto import Unpaired
from llmkit.losses.pairwise import Pairwise
from llmkit.losses.sides import Sides
from llmkit.stats.bootstrap import ratio

Figures = dict[str, np.ndarray[Any, Any]]
Columns = dict[str, torch.Tensor]


def judged(subject: Subject, loss: Pairwise | Unpaired, rows: Groups, ids: Sequence[int], capacity: int) -> Figures:
    """The losses and figures of these pairs (or single completions), (P,) each in the order of `ids`.

    Pairs are judged when all of them were asked for: a loss that compares those of a step compares all that are here,
    however they lay in forwards. What it says of a pair is then of its place among them (`Aot`).
    """
    if isinstance(loss, Unpaired):

        def alone(said: Any, batch: Batch) -> Columns:
            made = loss.judge(said, batch)
            return {"loss": made.losses, **made.figures}

        return _asked(subject, alone, rows, ids, capacity)
    found = _asked(subject, partial(_sides, loss), rows, ids, capacity)
    both = [_of(found, name) for name in ("policy", "reference") if f"{name}.chosen" in found]
    made = loss.loss(both[0], both[1] if len(both) > 1 else None)
    return {"loss": made.losses.numpy(), **{name: figure.numpy() for name, figure in made.figures.items()}}


def _sides(loss: Pairwise, said: Any, batch: Batch) -> Columns:
    both = dict(zip(("policy", "reference"), loss.compared(said, batch), strict=True))
    return {f"{name}.{key}": each for name, one in both.items() if one for key, each in one.columns().items()}


def _of(found: Figures, name: str) -> Sides:
    return Sides(
        **{key.removeprefix(f"{name}."): torch.from_numpy(each) for key, each in found.items() if key.startswith(name)}
    )


def _asked(
    subject: Subject, tell: Callable[[Any, Batch], Columns], rows: Groups, ids: Sequence[int], capacity: int
) -> Figures:
    """What is to be told of the branches of each batch, in the order of `ids`."""
    found: dict[int, list[float]] = {}
    names: list[str] = []
    share = subject.share
    with at_rest(subject):
        for batch in laid_out(subject, rows, ids, capacity):
            subject.check("in evaluation")
            with torch.no_grad(), subject.autocast():
                columns = tell(subject.scored(batch), batch)
            if batch.branches is None or not len(batch.branches.group):
                continue  # it was run for those who gather their weights for it
            names = list(columns)
            found |= dict(zip(batch.ids, torch.stack(list(columns.values()), 1).tolist(), strict=True))
    if share.count > 1:
        told = share.gather([names, *([i, values] for i, values in found.items())])
        names = next((part[0] for part in told if part[0]), names)
        found = {i: values for part in told for i, values in part[1:]}
    table = np.array([found[i] for i in ids], np.float64)
    return dict(zip(names, np.ascontiguousarray(table.T), strict=True))


def laid_out(subject: Subject, rows: Groups, ids: Sequence[int], capacity: int) -> Sequence[Batch]:
    """The batches of these examples that are this rank's share."""
    share, contexts = subject.share, subject.packed
    packing: Packing = FirstFit() if contexts else NoPacking()
    at_once = max(1, FORWARD_TOKENS // capacity)
    return micro_batches(
        rows,
        ids,
        packing,
        capacity,
        at_once,
        contexts,
        subject.device,
        share.index,
        share.count,
        subject.tree,
    )


def pairs_of(found: Figures) -> Pairs:
    """The rewards as scores of two answers."""
    names = ("reward_chosen", "reward_rejected", "length_chosen", "length_rejected")
    return Pairs(*(found[name] for name in names))


def preferred(subject: Subject, loss: Pairwise, rows: Groups, ids: Sequence[int], capacity: int) -> dict[str, float]:
    """The figures (`valid.*`) of these pairs; `valid.loss` is that of the stage."""
    found = judged(subject, loss, rows, ids, capacity)
    means = {name: float(each.mean()) for name, each in found.items()}
    made = means | figures(pairs_of(found)) | {"loss": means["loss"]}
    return {f"valid.{name}": value for name, value in made.items()}


def concluded(
    subject: Subject, loss: Pairwise, rows: Groups, ids: Sequence[int], capacity: int
) -> tuple[list[Prediction], list[Report]]:
    """A table of the pairs, each with what the model prefers, and the figures with their intervals."""
    found = judged(subject, loss, rows, ids, capacity)
    table = [_line(subject, rows, i, {n: float(x[at]) for n, x in found.items()}) for at, i in enumerate(ids)]
    clusters = [rows.rows[i].cluster for i in ids]
    made = [one for one in reports("valid", pairs_of(found), clusters, subject.seed) if one.metric != "valid.loss"]
    return table, [ratio("valid.loss", found["loss"], None, clusters, seed=subject.seed), *made]


def _line(subject: Subject, rows: Groups, index: int, scores: dict[str, float]) -> Prediction:
    """A pair: what was chosen, and what the model prefers."""
    begin, spans = int(rows.starts[index]), rows.completions(index)
    ids = np.asarray(rows.ids)
    chosen, rejected = (subject.tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=True) for a, b in spans)
    said = chosen if scores["reward_margin"] > 0 else rejected
    made = record(subject, "valid", rows.rows[index], ids[begin : spans[0][0]].tolist(), scores, said, chosen)
    return replace(made, slices={**made.slices, "kind": "preference"})
