"""What a classifier says of labelled rows: its chances, and figures of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmkit.core.errors import DataError, ModelError
from llmkit.core.records import Prediction
from llmkit.core.types import Report
from llmkit.data.batches import micro_batches
from llmkit.data.labelled import Labelled, Labels, labelled
from llmkit.data.node import Data, FirstFit, NoPacking, Packing
from llmkit.data.order import spread
from llmkit.evals.run import FORWARD_TOKENS, Subject, at_rest
from llmkit.evals.tasks import Classification
from llmkit.stats.bootstrap import of_sums, ratio

Array = np.ndarray[Any, Any]
BINS = 15
"""Bins of the calibration error, as is customary."""


def chances(subject: Subject, rows: Labelled, ids: Sequence[int], capacity: int) -> list[tuple[Array, Array]]:
    """(targets (N,), log-probabilities (N, C)) of each example, in the order of `ids`."""
    made: dict[int, tuple[Array, Array]] = {}
    packing: Packing = FirstFit() if subject.packed else NoPacking()
    at_once = max(1, FORWARD_TOKENS // capacity) if subject.packed else 4
    share, contexts = subject.share, subject.packed
    with at_rest(subject):
        for batch in micro_batches(
            rows, ids, packing, capacity, at_once, contexts, subject.device, share.index, share.count
        ):
            subject.check("in evaluation")
            with torch.no_grad(), subject.autocast():
                logits = subject.scored(batch)
            if share.count > 1 and not bool(batch.weights.any()):
                continue  # it was run for those who gather their weights for it
            logps = logits.float().log_softmax(1).cpu().numpy()
            sizes = [int((rows.sample(i)[2] != 0).sum()) for i in batch.ids]
            for i, part in zip(batch.ids, np.split(logps, np.cumsum(sizes)[:-1]), strict=True):
                _, targets, weights = rows.sample(i)
                made[i] = targets[weights != 0], part
    if share.count > 1:
        told = share.gather([[i, targets.tolist(), part.tolist()] for i, (targets, part) in made.items()])
        made = {i: (np.array(a, np.int64), np.array(b, np.float32)) for part in told for i, a, b in part}
    return [made[i] for i in ids]


def measured(subject: Subject, valid: Labelled, ids: Sequence[int], capacity: int) -> dict[str, float]:
    """The figures of an evaluation in training: loss, accuracy, macro-F1, recalls, calibration error."""
    found = chances(subject, valid, ids, capacity)
    targets, logps = (np.concatenate(column) for column in zip(*found, strict=True))
    said, names = logps.argmax(1), valid.classes
    sums = tallies(targets, said, len(names)).sum(0)
    figures = {
        "valid.loss": float(-logps[np.arange(len(targets)), targets].mean(dtype=np.float64)),
        "valid.accuracy": float((said == targets).mean()),
        "valid.f1": float(macro_f1(sums)),
        "valid.ece": float(calibration_error(calibration(targets, logps).sum(0))),
    }
    right, _, there = sums.reshape(3, -1)
    figures |= {f"valid.recall.{name}": r / n for name, r, n in zip(names, right, there, strict=True) if n}
    if is_chunks(names):
        by_row = [spans_of(there, marks.argmax(1), names) for there, marks in found]
        figures["valid.span_f1"] = float(f1_of(np.sum(by_row, 0)))
    return figures


def tallies(targets: Array, said: Array, classes: int) -> Array:
    """Of each target (N, 3 C): whether it was right, what was said, what it is; each under its class."""
    table = np.zeros((len(targets), 3, classes))
    at = np.arange(len(targets))
    table[at, 1, said] = table[at, 2, targets] = 1
    table[at, 0, targets] = said == targets
    return table.reshape(len(targets), -1)


def macro_f1(sums: Array) -> Array:
    """The mean over classes that are there, or were said, of 2 right / (said + there); sums are (..., 3 C)."""
    right, said, there = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
    each = 2 * right / np.maximum(said + there, 1e-12)
    seen = said + there > 0
    mean: Array = (each * seen).sum(-1) / np.maximum(seen.sum(-1), 1)
    return mean


def calibration(targets: Array, logps: Array) -> Array:
    """Of each target (N, bins + 1): confidence less whether it was right, in the bin of its confidence; and a 1."""
    confidence, at = np.exp(logps.max(1).astype(np.float64)), np.arange(len(targets))
    table = np.zeros((len(targets), BINS + 1))
    table[at, np.minimum((confidence * BINS).astype(int), BINS - 1)] = confidence - (logps.argmax(1) == targets)
    table[:, BINS] = 1
    return table


def calibration_error(sums: Array) -> Array:
    """Expected calibration error (arXiv:1706.04599): the mean gap of confidence and accuracy over equally wide bins."""
    gap: Array = np.abs(sums[..., :BINS]).sum(-1) / np.maximum(sums[..., BINS], 1)
    return gap


def is_chunks(names: Sequence[str]) -> bool:
    """Whether tags mark the beginning and inside of spans (B-X, I-X, O)."""
    return len(names) > 1 and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first, last, kind) of each span, as CoNLL's scorer reads tags: one begins at B, or at I after another kind."""
    found, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mine = tag[2:] if tag != "O" else ""
        if kind and (tag == "O" or tag[0] == "B" or mine != kind):
            found.add((start, place - 1, kind))
            kind = ""
        if mine and not kind:
            start, kind = place, mine
    return found


def spans_of(targets: Array, said: Array, names: Sequence[str]) -> Array:
    """(right, said, there) spans of one sentence."""
    there, made = (spans([names[i] for i in tags]) for tags in (targets, said))
    return np.array([len(there & made), len(made), len(there)], dtype=np.float64)


def f1_of(sums: Array) -> Array:
    """2 right / (said + there); sums are (..., 3)."""
    score: Array = 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1e-12)
    return score


def classification(task: Classification, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """Runs a classifier over the task's rows.

    Raises:
        ModelError: the model is no classifier.
        DataError: there is nothing to evaluate, or too many rows cannot be used.
    """
    head = getattr(subject.scored, "head", None)
    if head is None:
        raise ModelError("the model is no classifier", fix="give a result of kind: classify", key="model")
    data = Data(train=task.data, max_length=task.max_length, overflow="truncate")
    rows = labelled(task.data, data, subject.tokenizer, Labels(head.task, head.labels), f"tasks.{task.name}")
    return judged(subject, rows, spread(len(rows), task.rows), task.max_length, task.name)


def judged(
    subject: Subject, rows: Labelled, ids: Sequence[int], capacity: int, name: str
) -> tuple[list[Prediction], list[Report]]:
    """The table and the figures of these rows, each with an interval over clusters of rows."""
    if not ids:
        raise DataError("the evaluation set is empty", fix="give rows", key=f"tasks.{name}")
    found = chances(subject, rows, ids, capacity)
    table = [line for i, one in zip(ids, found, strict=True) for line in _lines(subject, rows, i, *one, name)]
    columns = np.stack([tallies(t, logps.argmax(1), len(rows.classes)).sum(0) for t, logps in found])
    clusters = [rows.rows[i].cluster for i in ids]
    size = len(rows.classes)
    right, there = columns[:, :size], columns[:, 2 * size :]
    reports = [
        ratio(f"{name}.accuracy", right.sum(1), there.sum(1), clusters, seed=subject.seed),
        of_sums(f"{name}.f1", columns, macro_f1, clusters, subject.seed),
    ]
    if is_chunks(rows.classes):
        by_span = np.stack([spans_of(targets, logps.argmax(1), rows.classes) for targets, logps in found])
        reports.append(of_sums(f"{name}.span_f1", by_span, f1_of, clusters, subject.seed))
    for place, label in enumerate(rows.classes):
        mine = np.flatnonzero(there[:, place])
        if len(mine):
            of_class = (right[mine, place], there[mine, place], [clusters[i] for i in mine])
            reports.append(ratio(f"{name}.recall", *of_class, seed=subject.seed, slice=label))
    gaps = np.stack([calibration(targets, logps).sum(0) for targets, logps in found])
    return table, [*reports, of_sums(f"{name}.ece", gaps, calibration_error, clusters, subject.seed)]


def _lines(subject: Subject, rows: Labelled, index: int, targets: Array, logps: Array, name: str) -> list[Prediction]:
    """The example's predictions: one, or one a word."""
    row, names = rows.rows[index], rows.classes
    one = len(targets) == 1
    text = subject.tokenizer.decode(rows.example(index)[0].tolist(), clean_up_tokenization_spaces=False)
    return [
        Prediction(
            example_id=f"{name}/{row.id}" + ("" if one else f"/{word}"),
            cluster_id=row.cluster,
            slices={"task": name, "kind": "classification"},
            label=names[target],
            scores={"accuracy": float(marks.argmax() == target)}
            | {f"choice_{label}": float(mark) for label, mark in zip(names, marks, strict=True)},
            prediction=names[int(marks.argmax())],
            text=text,
            model_version=subject.version,
            run_id=subject.run_id,
        )
        for word, (target, marks) in enumerate(zip(targets, logps, strict=True))
    ]
