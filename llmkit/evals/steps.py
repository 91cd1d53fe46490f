"""What a process reward model says of the steps of solutions, and figures of it. Shapes: T steps of one solution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.core.records import Prediction
from llmkit.core.types import Report
from llmkit.data.labelled import Labelled
from llmkit.data.node import Data
from llmkit.data.order import spread
from llmkit.data.stepwise import Steps, stepwise
from llmkit.evals.classify import chances
from llmkit.evals.run import Subject
from llmkit.evals.tasks import StepTask
from llmkit.stats.bins import calibration_error, edges, gaps
from llmkit.stats.bootstrap import of_sums, ratio

Array = np.ndarray[Any, Any]
Found = list[tuple[Array, Array]]
"""Of each solution the labels of its steps (T,), 1 where right, and the chances that they are right (T,)."""
BINS = 10
"""Of the calibration error, with equally many steps each."""


def judged_steps(subject: Subject, rows: Labelled, ids: Sequence[int], capacity: int) -> Found:
    """Labels and chances of the steps of each solution, in the order of `ids`."""
    found = chances(subject, rows, ids, capacity)
    return [(labels, np.exp(logps[:, 1].astype(np.float64))) for labels, logps in found]


def first_wrong(right: Array) -> int:
    """The place of the first step that is wrong; how many steps there are, where none is."""
    return int(np.argmin([*right.astype(bool), False]))


def tallies(found: Found) -> Array:
    """(solutions, 10): steps that are said rightly, steps; the same of wrong steps and of right ones; then solutions
    whose first wrong step is found, and solutions, of those with a wrong step and of those without."""
    rows = []
    for labels, chance in found:
        said, wrong = chance >= 0.5, labels == 0
        met = float(first_wrong(said) == first_wrong(labels))
        steps = [(said == labels)[part].sum() for part in (wrong | True, wrong, ~wrong)]
        sizes = [len(labels), wrong.sum(), (~wrong).sum()]
        flawed = float(wrong.any())
        rows.append([*steps, *sizes, met * flawed, flawed, met * (1 - flawed), 1 - flawed])
    return np.array(rows, dtype=np.float64)


SHARES = {
    ("accuracy", "all"): (0, 3),
    ("accuracy", "wrong"): (1, 4),
    ("accuracy", "right"): (2, 5),
    ("first_error", "flawed"): (6, 7),
    ("first_error", "sound"): (8, 9),
}
"""Columns of `tallies` whose sums are divided, by figure and slice."""


def first_error(sums: Array) -> Array:
    """Share of solutions whose first wrong step is found, or none said where there is none; sums are (..., 10)."""
    made: Array = (sums[..., 6] + sums[..., 8]) / (sums[..., 7] + sums[..., 9])
    return made


def balanced_first_error(sums: Array) -> Array:
    """Harmonic mean of the two: of solutions with a wrong step and without one (ProcessBench, arXiv:2412.06559)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        flawed, sound = sums[..., 6] / sums[..., 7], sums[..., 8] / sums[..., 9]
        made: Array = 2 * flawed * sound / np.maximum(flawed + sound, 1e-12)
    return made


def calibration(found: Found) -> Array:
    """(solutions, bins + 1): gaps of chance and label summed over a solution's steps."""
    labels, chance = (np.concatenate(column) for column in zip(*found, strict=True))
    table = gaps(chance, labels, edges(chance, min(BINS, len(chance))))
    cuts = np.cumsum([0, *(len(one) for one, _ in found)])[:-1]
    made: Array = np.add.reduceat(table, cuts)
    return made


def losses(found: Found) -> dict[str, Array]:
    """Sums over each solution's steps, (solutions,) each."""
    eps = 1e-12
    return {
        "loss": np.array([-np.log(np.where(y == 1, p, 1 - p).clip(eps)).sum() for y, p in found]),
        "brier": np.array([np.square(p - y).sum() for y, p in found]),
    }


def measured(subject: Subject, valid: Labelled, ids: Sequence[int], capacity: int) -> dict[str, float]:
    """The figures of an evaluation in training."""
    found = judged_steps(subject, valid, ids, capacity)
    table = tallies(found)
    sums, steps = table.sum(0), table[:, 3].sum()
    made = {name: float(each.sum() / steps) for name, each in losses(found).items()}
    for (name, part), (top, bottom) in SHARES.items():
        if sums[bottom]:
            made[name if part == "all" else f"{name}.{part}"] = float(sums[top] / sums[bottom])
    made["first_error"] = float(first_error(sums))
    if sums[7] and sums[9]:
        made["first_error_f1"] = float(balanced_first_error(sums))
    made["ece"] = float(calibration_error(calibration(found).sum(0)))
    return {f"valid.{name}": value for name, value in made.items()}


def reported(found: Found, clusters: Sequence[str], name: str, seed: int) -> list[Report]:
    """The figures with intervals over clusters of solutions."""
    table = tallies(found)
    made = []
    for (metric, part), (top, bottom) in SHARES.items():
        mine = np.flatnonzero(table[:, bottom])
        if len(mine):
            of_part = table[mine, top], table[mine, bottom], [clusters[i] for i in mine.tolist()]
            made.append(ratio(f"{name}.{metric}", *of_part, seed=seed, slice=part))
    made.append(of_sums(f"{name}.first_error", table, first_error, clusters, seed))
    if table[:, 7].any() and table[:, 9].any():
        made.append(of_sums(f"{name}.first_error_f1", table, balanced_first_error, clusters, seed))
    made += [ratio(f"{name}.{key}", each, table[:, 3], clusters, seed=seed) for key, each in losses(found).items()]
    return [*made, of_sums(f"{name}.ece", calibration(found), calibration_error, clusters, seed)]


def steps(task: StepTask, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """Judges the steps of the task's rows.

    Raises:
        DataError: there is nothing to evaluate, or too many rows cannot be used.
    """
    data = Data(train=task.data, max_length=task.max_length, overflow="truncate")
    how = Steps(task.separator, task.threshold)
    rows = stepwise(task.data, data, subject.tokenizer, how, f"tasks.{task.name}")
    return judged(subject, rows, spread(len(rows), task.rows), task.max_length, task.name)


def judged(
    subject: Subject, rows: Labelled, ids: Sequence[int], capacity: int, name: str
) -> tuple[list[Prediction], list[Report]]:
    """The table, a line for each step that has a label, and the figures.

    Raises:
        DataError: there is nothing to evaluate.
    """
    if not ids:
        raise DataError("the evaluation set is empty", fix="give rows", key=f"tasks.{name}")
    found = judged_steps(subject, rows, ids, capacity)
    table = [line for i, one in zip(ids, found, strict=True) for line in _lines(subject, rows, i, *one, name)]
    return table, reported(found, [rows.rows[i].cluster for i in ids], name, subject.seed)


def _lines(subject: Subject, rows: Labelled, index: int, labels: Array, chance: Array, name: str) -> list[Prediction]:
    """One prediction a step; its text is all up to the end of the step."""
    row, (ids, targets, _) = rows.rows[index], rows.sample(index)
    ends = np.flatnonzero(targets >= 0) + 1
    return [
        Prediction(
            example_id=f"{name}/{row.id}/{step}",
            cluster_id=row.cluster,
            slices={"task": name, "kind": "classification"},
            label=rows.classes[label],
            scores={"accuracy": float((p >= 0.5) == label), "right": float(p)},
            prediction=rows.classes[int(p >= 0.5)],
            text=subject.tokenizer.decode(ids[:end].tolist(), clean_up_tokenization_spaces=False),
            model_version=subject.version,
            run_id=subject.run_id,
        )
        for step, (label, p, end) in enumerate(zip(labels, chance, ends, strict=True))
    ]
