"""What a reward model says of pairs of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmkit.core.errors import DataError
from llmkit.core.records import Prediction
from llmkit.core.types import Report
from llmkit.data.batches import micro_batches
from llmkit.data.groups import Groups
from llmkit.data.judged import judged as answers
from llmkit.data.node import Data, FirstFit, NoPacking, Packing
from llmkit.data.order import spread
from llmkit.evals.pair_figures import Pairs, figures, reports
from llmkit.evals.run import FORWARD_TOKENS, Subject, at_rest
from llmkit.evals.tasks import PairTask
from llmkit.losses.reward import scores_of

Array = np.ndarray[Any, Any]
NAMES = ("rejected", "chosen")


def scores(subject: Subject, rows: Groups, ids: Sequence[int], capacity: int) -> list[list[float]]:
    """The scores of each example's answers, in the order of `ids`: each is computed once, by whoever has it in its
    share."""
    packing: Packing = FirstFit() if subject.packed else NoPacking()
    at_once, share = max(1, FORWARD_TOKENS // capacity) if subject.packed else 4, subject.share
    made: dict[int, list[float]] = {}
    batches = micro_batches(
        rows, ids, packing, capacity, at_once, subject.packed, subject.device, share.index, share.count, subject.tree
    )
    with at_rest(subject):
        for batch in batches:
            subject.check("in evaluation")
            with torch.no_grad(), subject.autocast():
                found = subject.scored(batch)
            if share.count > 1 and not bool(batch.weights.any()):
                continue  # it was run for those who gather their weights for it
            if batch.branches is None:
                raise TypeError("these rows have no answers")
            group, said = batch.branches.group.cpu(), scores_of(found, batch.branches).cpu()
            made |= {example: said[group == place].tolist() for place, example in enumerate(batch.ids)}
    if share.count > 1:
        told = share.gather([[example, said] for example, said in made.items()])
        made = {example: said for part in told for example, said in part}
    return [made[i] for i in ids]


def paired(rows: Groups, ids: Sequence[int], said: Sequence[Sequence[float]]) -> Pairs:
    """The scores and lengths of the chosen answers and of the rejected ones."""
    sides = [_sides(rows, i) for i in ids]
    columns = [
        [(own[up], own[down], *(rows.per["length"][first + at] for at in (up, down)))]
        for own, (first, up, down) in zip(said, sides, strict=True)
    ]
    return Pairs(*np.array(columns, np.float64)[:, 0].T)


def _sides(rows: Groups, index: int) -> tuple[int, int, int]:
    """The first answer of an example, and which of them is chosen and which rejected, counted from it.

    Raises:
        DataError: they are no pair.
    """
    first, end = int(rows.firsts[index]), int(rows.firsts[index + 1])
    labels = rows.per["label"][first:end] > 0.5
    if len(labels) != 2 or labels[0] == labels[1]:
        file, line = rows.places[index]
        raise DataError("is no pair", fix="give chosen and rejected", file=file, line=line)
    return first, int(labels.argmax()), int(labels.argmin())


def measured(subject: Subject, valid: Groups, ids: Sequence[int], capacity: int) -> dict[str, float]:
    """The figures of an evaluation in training."""
    made = figures(paired(valid, ids, scores(subject, valid, ids, capacity)))
    return {f"valid.{name}": value for name, value in made.items()}


def pairs(task: PairTask, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """Scores the task's rows.

    Raises:
        DataError: there is nothing to evaluate, or too many rows cannot be used.
    """
    data = Data(train=task.data, max_length=task.max_length, overflow="truncate")
    rows = answers(task.data, data, subject.tokenizer, f"tasks.{task.name}")
    return judged(subject, rows, spread(len(rows), task.rows), 2 * task.max_length, task.name)


def judged(
    subject: Subject, rows: Groups, ids: Sequence[int], capacity: int, name: str
) -> tuple[list[Prediction], list[Report]]:
    """The table, a line for each pair, and the figures with intervals over clusters of pairs.

    Raises:
        DataError: there is nothing to evaluate.
    """
    if not ids:
        raise DataError("the evaluation set is empty", fix="give rows", key=f"tasks.{name}")
    said = scores(subject, rows, ids, capacity)
    table = [_line(subject, rows, i, own, name) for i, own in zip(ids, said, strict=True)]
    clusters = [rows.rows[i].cluster for i in ids]
    return table, reports(name, paired(rows, ids, said), clusters, subject.seed)


def _line(subject: Subject, rows: Groups, index: int, said: Sequence[float], name: str) -> Prediction:
    """The chosen answer as what should be preferred, and the one that scores higher as what is."""
    first, up, down = _sides(rows, index)
    spans, ids = rows.completions(index), np.asarray(rows.ids)
    texts = [_text(subject.tokenizer, ids[begin : end - 1]) for begin, end in spans]
    right = 0.5 if said[up] == said[down] else float(said[up] > said[down])
    known = {"accuracy": right, "chosen": said[up], "rejected": said[down]}
    lengths = {f"tokens_{NAMES[at == up]}": float(rows.per["length"][first + at]) for at in (up, down)}
    row = rows.rows[index]
    return Prediction(
        example_id=f"{name}/{row.id}",
        cluster_id=row.cluster,
        slices={"task": name},
        label=texts[up],
        scores=known | lengths,
        prediction=texts[up if said[up] >= said[down] else down],
        text=_text(subject.tokenizer, ids[int(rows.starts[index]) : spans[0][0]]),
        model_version=subject.version,
        run_id=subject.run_id,
    )


def _text(tokenizer: Any, ids: Array) -> str:
    text: str = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    return text
