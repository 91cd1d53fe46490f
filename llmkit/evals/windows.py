"""Perplexity by position: windows of long documents, each in one forward, scored bucket by bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmkit.core.errors import DataError
from llmkit.core.records import Prediction
from llmkit.core.types import Batch, Packed, Report, Segment
from llmkit.data.node import Data
from llmkit.data.order import spread
from llmkit.data.prepare import Prepared, prepare
from llmkit.evals.run import Subject, at_rest
from llmkit.evals.tasks import PositionPerplexity
from llmkit.stats.bootstrap import ratio

Ids = np.ndarray[Any, np.dtype[np.int32]]
LONGEST = 1 << 24
"""Tokens of a document; more would be no document."""


@dataclass(frozen=True)
class Window:
    """Tokens of one forward, and the document that they are of."""

    ids: Ids
    cluster: str


def position_perplexity(task: PositionPerplexity, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """A prediction for each bucket of each window; the perplexity of each bucket and of all.

    Raises:
        DataError: no document is long enough.
    """
    data = Data(train=task.data, train_on="all", max_length=LONGEST)
    prepared = prepare(task.data, data, subject.tokenizer, f"tasks.{task.name}")
    found = windows(prepared, task)
    if not found:
        longest = int(np.diff(prepared.starts).max()) if task.documents == "whole" else len(prepared.ids)
        what = f"nothing has {task.length} tokens; the longest has {longest}"
        raise DataError(what, fix="lower length, or join documents", key=f"tasks.{task.name}.length")
    kept = [found[i] for i in spread(len(found), task.rows)]
    table: list[Prediction] = []
    subject.console.start(task.name, len(kept))
    with at_rest(subject):
        for place, window in enumerate(kept):
            table += _rows(task, subject, place, window)
            subject.console.step(task.name, place + 1, len(kept))
    subject.console.end()
    return table, _reports(task, table, subject.seed)


def windows(prepared: Prepared, task: PositionPerplexity) -> list[Window]:
    """Stretches of `length` tokens that do not overlap; what is left of a document is not enough to tell of its end."""
    ends, size = prepared.starts, task.length
    if task.documents == "joined":
        pieces = [(prepared.ids[at : at + size], at) for at in range(0, len(prepared.ids) - size + 1, size)]
        return [Window(ids, f"window {at // size}") for ids, at in pieces]
    return [
        Window(prepared.ids[at : at + size], prepared.rows[i].cluster)
        for i in range(len(prepared))
        for at in range(int(ends[i]), int(ends[i + 1]) - size + 1, size)
    ]


def whole(ids: Sequence[int] | Ids, subject: Subject) -> Batch:
    """One sequence alone in its row, every token but the first to be predicted."""
    tokens = torch.tensor(np.asarray(ids, dtype=np.int64), device=subject.device)[None]
    length, labels = tokens.shape[1], torch.zeros_like(tokens)
    labels[:, :-1] = tokens[:, 1:]
    weights = torch.ones(1, length, device=subject.device)
    weights[:, -1] = 0.0
    context = Packed((Segment(0, 0, length),)) if subject.packed else None
    positions = torch.arange(length, device=subject.device)[None]
    return Batch(tokens, positions, labels, weights, context, (0,), () if subject.packed else (length,))


def _rows(task: PositionPerplexity, subject: Subject, place: int, window: Window) -> list[Prediction]:
    """A row for each bucket: the first token of a window is never predicted, so that the first bucket has one less."""
    subject.check("in evaluation")
    with torch.no_grad(), subject.autocast():
        nll = -subject.scored(whole(window.ids, subject)).double().cpu().numpy()
    made = []
    for start, end in buckets(task):
        text = subject.tokenizer.decode(window.ids[start:end].tolist(), skip_special_tokens=True)
        mine = nll[max(start - 1, 0) : end - 1]
        scores = {"nll": float(mine.sum()), "tokens": float(len(mine)), "bytes": float(max(1, len(text.encode())))}
        made.append(
            Prediction(
                example_id=f"{task.name}/{place}/{start}",
                cluster_id=window.cluster,
                slices={"task": task.name, "positions": f"{start}-{end - 1}"},
                scores=scores,
                model_version=subject.version,
                run_id=subject.run_id,
            )
        )
    return made


def buckets(task: PositionPerplexity) -> list[tuple[int, int]]:
    """Positions [start, end) of each bucket."""
    width = task.length // task.buckets
    return [(start, start + width) for start in range(0, task.length, width)]


def _reports(task: PositionPerplexity, table: Sequence[Prediction], seed: int) -> list[Report]:
    parts = {"all": list(table)}
    for row in table:
        parts.setdefault(f"positions={row.slices['positions']}", []).append(row)
    nll, sizes = ([row.scores[name] for row in table] for name in ("nll", "bytes"))
    clusters = [row.cluster_id for row in table]
    bits = ratio(f"{task.name}.bits_per_byte", np.asarray(nll) / np.log(2), sizes, clusters, seed=seed)
    return [bits, *(_perplexity(task.name, part, rows, seed) for part, rows in parts.items())]


def _perplexity(name: str, part: str, rows: Sequence[Prediction], seed: int) -> Report:
    nll, tokens = ([row.scores[score] for row in rows] for score in ("nll", "tokens"))
    return ratio(f"{name}.perplexity", nll, tokens, [r.cluster_id for r in rows], np.exp, seed, slice=part)
