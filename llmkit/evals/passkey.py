"""Retrieval by depth and length: is the key the likeliest of several, and does greedy decoding write it?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from llmkit.core.records import Prediction
from llmkit.core.types import Batch, Report, Segment, Tree
from llmkit.evals.haystack import Haystacks, Hidden, fact
from llmkit.evals.run import Subject, at_rest
from llmkit.evals.tasks import Passkey
from llmkit.evals.windows import whole
from llmkit.stats.bootstrap import ratio

METRICS = ("exact_match", "accuracy", "margin")


def passkey(task: Passkey, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """A prediction for each sample of each cell; the three figures of each cell and of all.

    Raises:
        RecipeError: a length does not hold the question.
    """
    table: list[Prediction] = []
    cells = [(length, depth) for length in task.lengths for depth in depths(task)]
    subject.console.start(task.name, task.samples * len(cells))
    with at_rest(subject):
        for sample in range(task.samples):
            hidden = fact(task.needle, task.distractors, subject.seed, sample)
            made = Haystacks(subject.tokenizer, hidden, subject.seed, sample, max(task.lengths))
            for length, depth in cells:
                subject.check("in evaluation")
                asked = made.asked(length, depth, f"tasks.{task.name}.lengths")
                table.append(_row(task, subject, asked, sample, length, depth))
                subject.console.step(task.name, len(table), task.samples * len(cells))
    subject.console.end()
    return table, _reports(task, table, subject.seed)


def depths(task: Passkey) -> list[float]:
    """Where the fact lies: 0 is the beginning of the text and 1 its end."""
    return [0.5] if task.depths == 1 else [place / (task.depths - 1) for place in range(task.depths)]


def _row(task: Passkey, subject: Subject, asked: Hidden, sample: int, length: int, depth: float) -> Prediction:
    with torch.no_grad(), subject.autocast():
        marks, written = (_branched if subject.tree else _apart)(asked, subject)
    scores = {
        "exact_match": float(tuple(written) == asked.keys[0]),
        "accuracy": float(all(marks[0] > mark for mark in marks[1:])),
        "margin": marks[0] - sum(marks[1:]) / len(marks[1:]),
        **{f"choice_{place}": mark for place, mark in enumerate(marks)},
    }
    return Prediction(
        example_id=f"{task.name}/{sample}/{length}/{depth:.3g}",
        cluster_id=f"sample {sample}",
        slices={"task": task.name, "length": str(length), "depth": f"{depth:.3g}"},
        label=asked.texts[0],
        scores=scores,
        prediction=subject.tokenizer.decode(written).strip(),
        text=f"... {subject.tokenizer.decode(list(asked.prompt[-32:]))}",
        model_version=subject.version,
        run_id=subject.run_id,
    )


def _branched(asked: Hidden, subject: Subject) -> tuple[list[float], list[int]]:
    """(mean log-probability of each key's tokens, what greedy decoding writes up to its first miss), in one forward:
    the keys are branches of the prompt, each beginning with a copy of its last token."""
    start, device = len(asked.prompt) - 1, subject.device
    spans = list(pairwise(accumulate(map(len, asked.keys), initial=start)))
    tokens = [*asked.prompt[:-1], *(t for key in asked.keys for t in (asked.prompt[-1], *key[:-1]))]
    positions = [*range(start), *(start + place for key in asked.keys for place in range(len(key)))]
    labels = [*[0] * start, *(token for key in asked.keys for token in key)]
    weights = [*[0.0] * start, *[1.0] * (len(labels) - start)]
    context = Tree((Segment(0, 0, start), *(Segment(0, first, end, 0) for first, end in spans)))
    rows = [torch.tensor(row, device=device)[None] for row in (tokens, positions, labels)]
    batch = Batch(rows[0], rows[1], rows[2], torch.tensor(weights, device=device)[None], context, (0,))
    logps, best = subject.scored.likeliest(batch)
    parts = logps.split([len(key) for key in asked.keys])
    return [float(part.mean()) for part in parts], _written(asked.keys[0], best.tolist())


def _apart(asked: Hidden, subject: Subject) -> tuple[list[float], list[int]]:
    """The same with a forward for each key, for models that share no prefix."""
    marks: list[float] = []
    written: list[int] = []
    for place, key in enumerate(asked.keys):
        batch = whole((*asked.prompt, *key), subject)
        batch.weights[:, : len(asked.prompt) - 1] = 0.0
        logps, best = subject.scored.likeliest(batch)
        marks.append(float(logps.mean()))
        written = _written(key, best.tolist()) if place == 0 else written
    return marks, written


def _written(key: Sequence[int], best: Sequence[int]) -> list[int]:
    """What greedy decoding writes, as far as a forward over the key shows it: up to the first token that is another."""
    right = next((place for place, token in enumerate(key) if best[place] != token), len(key))
    return list(best[: min(right + 1, len(key))])


def _reports(task: Passkey, table: Sequence[Prediction], seed: int) -> list[Report]:
    parts = {"all": list(table)}
    for row in table:
        parts.setdefault(f"length={row.slices['length']},depth={row.slices['depth']}", []).append(row)
    return [
        ratio(
            f"{task.name}.{metric}",
            [row.scores[metric] for row in rows],
            None,
            [row.cluster_id for row in rows],
            seed=seed,
            slice=part,
        )
        for part, rows in parts.items()
        for metric in METRICS
    ]
