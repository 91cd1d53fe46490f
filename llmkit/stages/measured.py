"""Evaluation on `data.valid` while training, and answers to some of its prompts."""

from __future__ import annotations

import math

from llmkit.build.training import Built
from llmkit.core.errors import DataError
from llmkit.core.memory import out_of_memory_named
from llmkit.core.metrics import Lines
from llmkit.data.order import spread
from llmkit.data.prompt import asked
from llmkit.evals.run import Subject, losses
from llmkit.inference.node import Sampling, Transformers
from llmkit.parallel.single import Single
from llmkit.stages.job import Job
from llmkit.stages.sizes import KNOB


def subject(job: Job, built: Built, steps: Single) -> Subject:
    """The model in training, as an evaluation sees it."""
    return Subject(
        built.scored,
        built.model,
        built.loaded.tokenizer,
        built.loaded.support.packed,
        job.run.device,
        Transformers(),
        job.run.console,
        job.run.stop.check,
        autocast=steps.autocast,
        seed=job.node.seed,
        tree=built.loaded.support.tree,
    )


def measured(job: Job, built: Built, steps: Single, step: int) -> dict[str, float]:
    """An evaluation whose lack of memory is called that, and no fault of its rows."""
    with out_of_memory_named(job.run.device, KNOB), steps.averaged():
        return _evaluate(job, built, steps, step)


def _evaluate(job: Job, built: Built, steps: Single, step: int) -> dict[str, float]:
    valid = job.valid
    if valid is None:
        raise DataError("data.valid is empty", fix="give data.valid", key="evaluate")
    ids = spread(len(valid), job.node.evaluate.rows)
    seen = subject(job, built, steps)
    nll, weight = losses(seen, valid, ids, job.node.data.max_length)
    mean = sum(nll) / sum(weight)
    texts = [valid.example(i)[0][1:][valid.example(i)[1][1:] > 0] for i in ids]
    size = sum(len(built.loaded.tokenizer.decode(text, skip_special_tokens=True).encode()) for text in texts)
    figures = {"valid.loss": mean, "valid.perplexity": math.exp(min(mean, 700.0))}
    figures |= {"valid.bits_per_byte": sum(nll) / math.log(2) / max(1, size), "valid.tokens": sum(weight)}
    _samples(job, seen, step)
    return figures


def _samples(job: Job, seen: Subject, step: int) -> None:
    """Answers to some validation prompts, beside what they should be."""
    rows = job.valid.rows if job.valid is not None else ()
    questions = asked(rows, seen.tokenizer, job.node.evaluate.samples)
    if not questions:
        return
    sampling = Sampling(max_tokens=job.node.evaluate.max_tokens)
    with job.run.stop.at_once("before samples"), seen.autocast():
        made = seen.generator.generate(seen.model, seen.tokenizer, [q.ids for q in questions], sampling)
    lines = Lines(job.run.folder / "samples.jsonl")
    for question, completion in zip(questions, made, strict=True):
        row = question.row
        last = row.question if isinstance(row.question, str) else str(row.question[-1].get("content"))
        lines.add({"step": step, "prompt": last, "expected": row.answer, "answer": completion.text})
