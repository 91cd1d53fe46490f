"""Evaluation on `data.valid` while training, and answers to some of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from llmkit.build.held import Here
from llmkit.build.training import Built
from llmkit.core.errors import DataError
from llmkit.core.memory import out_of_memory_named
from llmkit.core.metrics import Lines
from llmkit.data.order import spread
from llmkit.data.prompt import asked
from llmkit.evals.run import Share, Subject, at_rest, prompt_of
from llmkit.inference.cache import Cache
from llmkit.inference.generate import ends
from llmkit.inference.node import OwnEngine, Transformers
from llmkit.inference.request import Ask, Completion, ended, telling
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import Writer
from llmkit.models.positions import steady_length
from llmkit.parallel.steps import Steps
from llmkit.stages.job import Job

BLOCK = Cache().block


def subject(job: Job, built: Built, steps: Steps) -> Subject:
    """The model in training, as an evaluation sees it."""
    return Subject(
        built.scored,
        built.model,
        built.loaded.tokenizer,
        built.loaded.support.packed,
        job.run.device,
        partial(writer, job, built),
        job.run.console,
        job.run.stop.check,
        autocast=steps.autocast,
        seed=job.node.seed,
        tree=built.loaded.support.tree,
        share=_share(job),
        bench=job.bench,
    )


def writer(job: Job, built: Built, most: int | None = None) -> closing[Writer]:
    """What writes samples: the engine, over the weights as they are at that moment, with a cache of at most `most`
    tokens; transformers where it cannot run the model, or no rank has it whole."""
    return closing(generator(job, built).open(Here(built.loaded, built.model, most=most)))


def generator(job: Job, built: Built) -> OwnEngine | Transformers:
    """Which of both."""
    able = built.loaded.support.paged and job.node.parallel.whole(job.run.ranks.world)
    return OwnEngine() if able else Transformers()


def _share(job: Job) -> Share:
    """Ranks that train on different rows evaluate different rows too; those that hold a model together, the same."""
    ranks = job.run.ranks
    degrees = job.node.parallel.degrees(ranks.world)
    if degrees.data == 1:
        return Share()
    parts = [degrees.data_index(rank) for rank in range(ranks.world)]
    firsts = [parts.index(part) for part in range(degrees.data)]

    def gather(value: Any) -> list[Any]:
        told = job.run.peers.gather(value if ranks.rank in firsts else None)
        return [told[rank] for rank in firsts]

    return Share(parts[ranks.rank], degrees.data, gather)


def measured(job: Job, built: Built, steps: Steps, step: int) -> dict[str, float]:
    """An evaluation whose lack of memory is called that, and no fault of its rows. What follows from its figures (the
    best, the end) all ranks must do alike: they go by the main one's, to the bit."""
    with out_of_memory_named(job.run.device, job.node.knob), steps.averaged():
        figures: dict[str, float] = job.run.peers.share(_evaluate(job, built, steps, step))
        return figures


def _evaluate(job: Job, built: Built, steps: Steps, step: int) -> dict[str, float]:
    valid = job.valid
    if valid is None:
        raise DataError("data.valid is empty", fix="give data.valid", key="evaluate")
    ids = spread(len(valid), job.node.evaluate.rows)
    seen = subject(job, built, steps)
    figures = job.node.measure(seen, valid, ids)
    _samples(job, built, seen, step)
    return figures


def written(job: Job, built: Built, seen: Subject, asks: Sequence[Ask]) -> list[Completion]:
    """What the model says to all asks, by the weights that it has now."""
    need = sum(-(-(len(ask.prompt.ids) + ask.sampling.max_tokens) // BLOCK) * BLOCK for ask in asks)
    with seen.autocast(), at_rest(seen), writer(job, built, need) as opened:
        made: list[Completion] = seen.scored.inside(lambda: list(opened.each(asks)))
    return made


def said(job: Job, built: Built, steps: Steps, asks: Sequence[Ask]) -> list[list[int]]:
    """The tokens of its answers, with the one that ended each."""
    own = ends(built.loaded.model, built.loaded.tokenizer)
    told = [replace(ask, sampling=telling(ask.sampling, own)) for ask in asks]
    return [ended(one.sound()) for one in written(job, built, subject(job, built, steps), told)]


def _samples(job: Job, built: Built, seen: Subject, step: int) -> None:
    """Answers to some validation prompts, beside what they should be."""
    if not job.node.writes or job.node.head(job.train) is not None:
        return
    rows = job.valid.rows if job.valid is not None else ()
    most = job.node.evaluate.max_tokens
    found = asked(rows, seen.tokenizer, job.node.evaluate.samples)
    room = [steady_length(seen.model, len(one.ids) + most) - len(one.ids) for one in found]
    questions = [one for one, left in zip(found, room, strict=True) if left > 0]
    asks = [Ask(prompt_of(one), Sampling(max_tokens=left)) for one, left in zip(found, room, strict=True) if left > 0]
    if not asks:
        return
    with job.run.stop.at_once("before samples"):
        made = written(job, built, seen, asks)
    lines = Lines(job.run.scratch / "samples.jsonl")
    for question, completion in zip(questions, made, strict=True):
        row = question.row
        last = row.question if isinstance(row.question, str) else str(row.question[-1].get("content"))
        lines.add({"step": step, "prompt": last, "expected": row.answer, "answer": completion.text or completion.why})
