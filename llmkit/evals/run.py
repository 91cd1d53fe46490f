"""Running tasks: every example gets a row in a table, every figure an interval over it."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmkit.core.console import Console
from llmkit.core.errors import DataError
from llmkit.core.records import Prediction
from llmkit.core.types import Report
from llmkit.data.batches import micro_batches
from llmkit.data.node import Data, Docstrings, FirstFit, NoPacking, Packing
from llmkit.data.prepare import Prepared, prepare, read_rows
from llmkit.data.render import Rendered, Renderer
from llmkit.data.rows import Row, mapped
from llmkit.evals.tasks import Generation, MultipleChoice, Perplexity, data_of
from llmkit.inference.node import Sampling, Transformers
from llmkit.stats.bootstrap import difference, ratio

FORWARD_TOKENS = 1024
"""Tokens of one evaluation forward, about."""


@dataclass(frozen=True)
class Subject:
    """A model under evaluation."""

    scored: Any
    """`Scored`: a batch -> log-probabilities of its weighted tokens."""
    model: Any
    tokenizer: Any
    packed: bool
    """Whether the model takes packed rows."""
    device: str
    generator: Transformers
    console: Console
    check: Callable[[str], None]
    """Raises when someone asked to stop."""
    version: str = ""
    run_id: str = ""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    seed: int = 0


def losses(subject: Subject, prepared: Prepared, ids: Sequence[int], capacity: int) -> tuple[list[float], list[float]]:
    """(negative log-likelihood, weight) of each example."""
    sums, weights = dict.fromkeys(ids, 0.0), dict.fromkeys(ids, 0.0)
    packing: Packing = FirstFit() if subject.packed else NoPacking()
    rows = max(1, FORWARD_TOKENS // capacity) if subject.packed else 4
    training = subject.scored.training
    subject.scored.eval()
    try:
        batches = micro_batches(prepared, ids, packing, capacity, rows, subject.packed, subject.device)
        for batch in batches:
            subject.check("in evaluation")
            with torch.no_grad(), subject.autocast():
                logps = subject.scored(batch)
            chosen = batch.weights != 0
            owner = _owners(batch)[chosen]
            weight = batch.weights[chosen]
            for place, example in enumerate(batch.ids):
                mine = owner == place
                sums[example] -= float((logps * weight)[mine].sum(dtype=torch.float64))
                weights[example] += float(weight[mine].sum(dtype=torch.float64))
    finally:
        subject.scored.train(training)
    return [sums[i] for i in ids], [weights[i] for i in ids]


def _owners(batch: Any) -> torch.Tensor:
    """Which of the batch's examples each position belongs to, (B, T)."""
    owner = torch.full(batch.tokens.shape, -1, device=batch.tokens.device)
    if batch.lengths:
        for row, length in enumerate(batch.lengths):
            owner[row, :length] = row
    else:
        for place, segment in enumerate(batch.attend.segments):
            owner[segment.row, segment.start : segment.end] = place
    return owner


def perplexity(task: Perplexity, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """Perplexity and bits per byte over the trained parts of each row.

    Raises:
        DataError: there is nothing to evaluate.
    """
    data = data_of(task)
    prepared = prepare(task.data, data, subject.tokenizer, f"tasks.{task.name}")
    ids = range(min(len(prepared), task.rows or len(prepared)))
    nll, weight = losses(subject, prepared, ids, data.max_length)
    sizes = [float(len(_learned(prepared, i, subject.tokenizer).encode())) for i in ids]
    clusters = [prepared.rows[i].cluster for i in ids]
    table = [
        _row(subject, task.name, prepared.rows[i], {"nll": nll[i], "tokens": weight[i], "bytes": sizes[i]}) for i in ids
    ]
    bits = [value / np.log(2) for value in nll]
    return table, [
        ratio(f"{task.name}.perplexity", nll, weight, clusters, np.exp, subject.seed),
        ratio(f"{task.name}.bits_per_byte", bits, sizes, clusters, seed=subject.seed),
    ]


def _learned(prepared: Prepared, index: int, tokenizer: Any) -> str:
    ids, weights = prepared.example(index)
    text: str = tokenizer.decode(ids[1:][weights[1:] > 0], skip_special_tokens=True)
    return text or " "


def generation(task: Generation, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """Exact match and ROUGE-1, -2, -L (F1) of what the model writes.

    Raises:
        DataError: there is nothing to evaluate.
    """
    rows = _rows(task)
    subject.console.start(task.name, len(rows))

    def moved(done: int) -> None:
        subject.check("in evaluation")
        subject.console.step(task.name, done, len(rows))

    sampling = Sampling(max_tokens=task.max_tokens)
    prompts = [list(row.question) if row.messages else row.question for row in rows]
    made = subject.generator.generate(subject.model, subject.tokenizer, prompts, sampling, moved)
    subject.console.end()
    scores = [_scores(row.answer, completion.text, task.extract) for row, completion in zip(rows, made, strict=True)]
    table = [
        _row(subject, task.name, row, score, completion.text)
        for row, score, completion in zip(rows, scores, made, strict=True)
    ]
    clusters = [row.cluster for row in rows]
    return table, [
        ratio(f"{task.name}.{metric}", [score[metric] for score in scores], None, clusters, seed=subject.seed)
        for metric in scores[0]
    ]


def _rows(task: Generation) -> list[Row]:
    data = Data(train=task.data)
    rows = [row for row in read_rows(task.data, data, Counter()) if row.question]
    if not rows:
        raise DataError("the evaluation set has no row with a question", fix="give rows with a prompt", key=task.name)
    return rows[: task.rows]


def _scores(reference: str, answer: str, extract: str | None) -> dict[str, float]:
    rouge = _rouge().score(reference, answer)
    exact = _extracted(reference, extract) == _extracted(answer, extract)
    named = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    return {"exact_match": float(exact)} | {ours: rouge[theirs].fmeasure for theirs, ours in named.items()}


def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _extracted(text: str, pattern: str | None) -> str:
    if pattern is None:
        return " ".join(text.split())
    found = list(re.finditer(pattern, text))
    return found[-1][(found[-1].re.groups and 1) or 0] if found else ""


def multiple_choice(task: MultipleChoice, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """Accuracy of the likeliest choice.

    Raises:
        DataError: a row has no choices or no label, or there is none.
    """
    renderer = Renderer(subject.tokenizer)
    asked = list(itertools.islice(_choices(task), task.rows))
    if not asked:
        raise DataError("the evaluation set is empty", fix="give rows", key=task.name)
    flat = [(n, choice) for n, (_, choices, _) in enumerate(asked) for choice in choices]
    rendered = [_asked(renderer, asked[n][0], choice) for n, choice in flat]
    prepared = _as_prepared(renderer.encode(rendered))
    nll, tokens = losses(subject, prepared, range(len(flat)), max(64, int(np.diff(prepared.starts).max())))
    table: list[Prediction] = []
    for n, (row, choices, label) in enumerate(asked):
        mine = [i for i, (owner, _) in enumerate(flat) if owner == n]
        sizes = {"sum": [1.0] * len(flat), "token": tokens, "byte": [float(len(text.encode())) for _, text in flat]}
        marks = [-nll[i] / max(1.0, sizes[task.length][i]) for i in mine]
        best = int(np.argmax(marks))
        score = {"accuracy": float(best == label), **{f"choice_{k}": mark for k, mark in enumerate(marks)}}
        table.append(_row(subject, task.name, row, score, choices[best], choices[label]))
    right = [row.scores["accuracy"] for row in table]
    return table, [ratio(f"{task.name}.accuracy", right, None, [row.cluster_id for row in table], seed=subject.seed)]


def _choices(task: MultipleChoice) -> Iterator[tuple[Row, list[str], int]]:
    number = 0
    for source in task.data:
        for raw in source.rows():
            if isinstance(raw, DataError):
                raise raw
            values = mapped(raw, {} if isinstance(source, Docstrings) else source.columns)
            choices: Any = values.get("choices")
            label = values.get("label")
            fine = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
            if not fine or not isinstance(label, int) or not 0 <= label < len(choices):
                raise DataError(
                    "needs `prompt`, `choices` (a list of texts) and `label` (an index)",
                    fix="mend the row, or map its columns",
                    file=raw.file,
                    line=raw.line,
                )
            prompt = values.get("prompt")
            messages = tuple(prompt) if isinstance(prompt, list) else ()
            row = Row(
                number, str(values.get("cluster", number)), messages, prompt="" if messages else str(prompt or "")
            )
            yield row, choices, label
            number += 1


def _asked(renderer: Renderer, row: Row, choice: str) -> Rendered:
    if row.messages:
        answer: Mapping[str, Any] = {"role": "assistant", "content": choice}
        return renderer.render(Row(row.id, row.cluster, (*row.messages, answer), len(row.messages)))
    return renderer.render(Row(row.id, row.cluster, prompt=row.prompt, completion=choice))


def _as_prepared(encoded: Sequence[tuple[list[int], list[float]]]) -> Prepared:
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in encoded])]).astype(np.int64)
    ids = np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in encoded])
    weights = np.concatenate([np.array(w, dtype=np.float32) for _, w in encoded])
    return Prepared(ids, weights, starts, ())


def _row(
    subject: Subject, task: str, row: Row, scores: Mapping[str, float], prediction: str = "", label: str | None = None
) -> Prediction:
    question = (
        row.question if isinstance(row.question, str) else "\n\n".join(str(m.get("content")) for m in row.question)
    )
    return Prediction(
        example_id=f"{task}/{row.id}",
        cluster_id=row.cluster,
        slices={"task": task},
        label=row.answer if label is None else label,
        scores=dict(scores),
        prediction=prediction,
        text=question,
        model_version=subject.version,
        run_id=subject.run_id,
    )


def compare(new: Sequence[Prediction], old: Sequence[Prediction], seed: int = 0) -> list[Report]:
    """The paired differences of two tables, new - old, metric by metric.

    Raises:
        DataError: they are not of the same examples.
    """
    reports: list[Report] = []
    for task in dict.fromkeys(row.slices["task"] for row in new):
        a = {row.example_id: row for row in new if row.slices["task"] == task}
        b = {row.example_id: row for row in old if row.slices["task"] == task}
        if a.keys() != b.keys():
            raise DataError(f"{task}: the tables are not of the same examples", fix="evaluate both on the same rows")
        clusters = [a[key].cluster_id for key in a]
        scores = next(iter(a.values())).scores
        if "nll" in scores:
            new_sums, old_sums = (([t[k].scores["nll"] for k in a], [t[k].scores["tokens"] for k in a]) for t in (a, b))
            reports.append(difference(f"{task}.perplexity", new_sums, old_sums, clusters, np.exp, seed))
            new_bits, old_bits = (
                ([t[k].scores["nll"] / np.log(2) for k in a], [t[k].scores["bytes"] for k in a]) for t in (a, b)
            )
            reports.append(difference(f"{task}.bits_per_byte", new_bits, old_bits, clusters, seed=seed))
            continue
        for metric in scores:
            if not metric.startswith("choice_"):
                left, right = (([t[k].scores[metric] for k in a], None) for t in (a, b))
                reports.append(difference(f"{task}.{metric}", left, right, clusters, seed=seed))
    return reports
