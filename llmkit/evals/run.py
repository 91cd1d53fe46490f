"""Running tasks: every example gets a row in a table, every figure an interval over it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmkit.core.console import Console
from llmkit.core.errors import DataError
from llmkit.core.records import Prediction
from llmkit.core.types import Report
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit, NoPacking, Packing
from llmkit.data.order import spread
from llmkit.data.prepare import Prepared, prepare
from llmkit.data.prompt import Question, questions
from llmkit.data.rows import Row
from llmkit.evals.tasks import Generation, Perplexity, data_of
from llmkit.inference.request import Prompt
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import Writer, generate
from llmkit.stats.bootstrap import Transform, difference, ratio, same

FORWARD_TOKENS = 1024
"""Tokens of one evaluation forward, about."""


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Share:
    """Which of `count` equal parts of an evaluation's forward passes this process makes, and how they meet."""

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    """A JSON value of this process -> those of all parts, in their order."""


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
    writer: Callable[[], AbstractContextManager[Writer]]
    """Opens what makes its text."""
    console: Console
    check: Callable[[str], None]
    """Raises when someone asked to stop."""
    version: str = ""
    run_id: str = ""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    seed: int = 0
    tree: bool = False
    """Whether the model takes shared prefixes."""
    share: Share = Share()
    bench: Any = None
    """What the run's rewards hold (`rl/bench.py`): an evaluation asks those that training asks."""


@contextmanager
def at_rest(subject: Subject) -> Iterator[None]:
    """While a model is asked: no dropout."""
    training = subject.scored.training
    subject.scored.eval()
    try:
        yield
    finally:
        subject.scored.train(training)


def losses(subject: Subject, prepared: Prepared, ids: Sequence[int], capacity: int) -> tuple[list[float], list[float]]:
    """(negative log-likelihood, weight) of each example: each is computed once, by whoever has it in its share."""
    sums, weights = dict[int, float](), dict[int, float]()
    share = subject.share
    packing: Packing = FirstFit() if subject.packed else NoPacking()
    rows = max(1, FORWARD_TOKENS // capacity) if subject.packed else 4
    with at_rest(subject):
        batches = micro_batches(
            prepared, ids, packing, capacity, rows, subject.packed, subject.device, share.index, share.count
        )
        for batch in batches:
            subject.check("in evaluation")
            with torch.no_grad(), subject.autocast():
                logps = subject.scored(batch)
            chosen = batch.weights != 0
            if share.count > 1 and not bool(chosen.any()):
                continue  # it was run for those who gather their weights for it
            owner = _owners(batch, prepared)[chosen]
            weight = batch.weights[chosen]
            for place, example in enumerate(batch.ids):
                mine = owner == place
                sums[example] = -float((logps * weight)[mine].sum(dtype=torch.float64))
                weights[example] = float(weight[mine].sum(dtype=torch.float64))
    if share.count > 1:
        found = [one for part in share.gather([[i, sums[i], weights[i]] for i in sums]) for one in part]
        sums, weights = {i: nll for i, nll, _ in found}, {i: weight for i, _, weight in found}
    return [sums.get(i, 0.0) for i in ids], [weights.get(i, 0.0) for i in ids]


def _owners(batch: Any, prepared: Prepared) -> torch.Tensor:
    """Which of the batch's examples each position belongs to, (B, T)."""
    owner = torch.full(batch.tokens.shape, -1, device=batch.tokens.device)
    if batch.lengths:
        for row, length in enumerate(batch.lengths):
            owner[row, :length] = row
        return owner
    start = 0
    for place, example in enumerate(batch.ids):  # one behind the other, in one row
        owner[0, start : (start := start + prepared.length(example))] = place
    return owner


def held_out(subject: Subject, valid: Prepared, ids: Sequence[int], capacity: int) -> dict[str, float]:
    """Loss, perplexity and bits per byte of what these rows train."""
    nll, weight = losses(subject, valid, ids, capacity)
    mean = sum(nll) / sum(weight)
    size = sum(len(_learned(valid, i, subject.tokenizer).encode()) for i in ids)
    figures = {"valid.loss": mean, "valid.perplexity": math.exp(min(mean, 700.0))}
    return figures | {"valid.bits_per_byte": sum(nll) / math.log(2) / max(1, size), "valid.tokens": sum(weight)}


def perplexity(task: Perplexity, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """Perplexity and bits per byte over the trained parts of each row.

    Raises:
        DataError: there is nothing to evaluate.
    """
    data = data_of(task)
    prepared = prepare(task.data, data, subject.tokenizer, f"tasks.{task.name}")
    ids = spread(len(prepared), task.rows)
    nll, weight = losses(subject, prepared, ids, data.max_length)
    sizes = [float(len(_learned(prepared, i, subject.tokenizer).encode())) for i in ids]
    clusters = [prepared.rows[i].cluster for i in ids]
    table = [
        record(
            subject,
            task.name,
            prepared.rows[i],
            before_answer(*(part.tolist() for part in prepared.example(i))),
            {"nll": nll[place], "tokens": weight[place], "bytes": sizes[place]},
        )
        for place, i in enumerate(ids)
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
        DataError: there is nothing to evaluate, too many rows cannot be used, or an answer failed.
    """
    asked = questions(task.data, subject.tokenizer, f"tasks.{task.name}", task.rows)
    subject.console.start(task.name, len(asked))

    def moved(done: int) -> None:
        subject.check("in evaluation")
        subject.console.step(task.name, done, len(asked))

    prompts, sampling = [prompt_of(question) for question in asked], Sampling(max_tokens=task.max_tokens)
    with at_rest(subject), subject.autocast(), subject.writer() as writer:
        made = [one.sound() for one in generate(writer, prompts, sampling, moved)]
    subject.console.end()
    table = [
        record(
            subject,
            task.name,
            question.row,
            question.ids,
            _scores(question.row.answer, completion.text, task.extract),
            completion.text,
        )
        for question, completion in zip(asked, made, strict=True)
    ]
    clusters = [row.cluster_id for row in table]
    return table, [
        ratio(f"{task.name}.{metric}", [row.scores[metric] for row in table], None, clusters, seed=subject.seed)
        for metric in table[0].scores
    ]


def prompt_of(question: Question) -> Prompt:
    """A question as generators take it."""
    said = question.row.question
    return Prompt(question.ids, said if isinstance(said, str) else tuple(said), question.row.tools)


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


def record(
    subject: Subject,
    task: str,
    row: Row,
    asked: Sequence[int],
    scores: Mapping[str, float],
    prediction: str = "",
    label: str | None = None,
) -> Prediction:
    """One line of the table; `asked` are the tokens before the answer."""
    return Prediction(
        example_id=f"{task}/{row.id}",
        cluster_id=row.cluster,
        slices={"task": task},
        label=row.answer if label is None else label,
        scores=dict(scores),
        prediction=prediction,
        text=subject.tokenizer.decode(list(asked), clean_up_tokenization_spaces=False),
        model_version=subject.version,
        run_id=subject.run_id,
    )


def before_answer(ids: Sequence[int], weights: Sequence[float]) -> Sequence[int]:
    """The tokens before the last stretch that has weights."""
    trained = np.asarray(weights) > 0
    last = int(np.flatnonzero(trained).max(initial=-1))
    untrained = np.flatnonzero(~trained[: last + 1])
    return ids[: int(untrained.max(initial=-1)) + 1]


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
        for part in ("all", *dict.fromkeys(filter(None, map(_part, a.values())))):
            keys = [key for key, row in a.items() if part in ("all", _part(row))]
            reports += _differences(task, part, [(a[key], b[key]) for key in keys], seed)
    return reports


def _part(row: Prediction) -> str:
    """The slice that a row is of beside its task, or nothing."""
    return ",".join(f"{name}={value}" for name, value in row.slices.items() if name != "task")


def _differences(task: str, part: str, pairs: Sequence[tuple[Prediction, Prediction]], seed: int) -> list[Report]:
    clusters, scores = [new.cluster_id for new, _ in pairs], pairs[0][0].scores

    def one(name: str, top: str, bottom: str = "", transform: Transform = same, scale: float = 1.0) -> Report:
        sides = [[pair[side].scores for pair in pairs] for side in (0, 1)]
        new, old = (([s[top] / scale for s in side], [s[bottom] for s in side] if bottom else None) for side in sides)
        return difference(f"{task}.{name}", new, old, clusters, transform, seed, slice=part)

    if "nll" in scores:
        bits = one("bits_per_byte", "nll", "bytes", scale=float(np.log(2)))
        return [one("perplexity", "nll", "tokens", np.exp), bits]
    return [one(metric, metric) for metric in scores if not metric.startswith("choice_")]
