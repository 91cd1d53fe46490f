"""Puts a training stage together: the only place that knows all the pieces of `sft`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from llmkit_kernels import memory
from llmkit_kernels.table import rows

from llmkit.adapters.node import Lora
from llmkit.build.precision import Types, types
from llmkit.build.training import Built, build, how, stepper
from llmkit.checkpoint import state
from llmkit.checkpoint.identity import packages, processor
from llmkit.core.artifact import Artifact, publish
from llmkit.core.errors import DataError
from llmkit.core.memory import keep_freed_memory, out_of_memory_named
from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit, NoPacking, Packing
from llmkit.data.order import Order, spread
from llmkit.data.prepare import Prepared, prepare, template_digest
from llmkit.data.prompt import asked
from llmkit.evals.run import Subject, losses
from llmkit.inference.node import Sampling, Transformers
from llmkit.losses.token import CrossEntropy
from llmkit.models.export import export
from llmkit.models.load import read_tokenizer
from llmkit.models.positions import check_length
from llmkit.parallel.single import Single
from llmkit.plan.account import Choice
from llmkit.stages.job import Job
from llmkit.stages.quarantine import Quarantine
from llmkit.stages.report import write_report
from llmkit.stages.resume import find, identity, pinned, resume, told
from llmkit.stages.sft import Sft
from llmkit.stages.sizes import KNOB, sizes, whole_model
from llmkit.stages.speed import measure
from llmkit.stages.tensorboard import writer
from llmkit.train.fit import Hooks, Plan, Progress, StepData, fit


def train(node: Sft, run: Run) -> Artifact:
    """Trains a stage, or goes on with one that was interrupted."""
    keep_freed_memory()
    torch.set_num_threads(run.threads)
    torch.use_deterministic_algorithms(node.deterministic, warn_only=False)
    with out_of_memory_named(run.device, KNOB):
        with run.stop.at_once("before training"):
            job = read(node, run)
        found = find(job)
        with told(found):
            job = pinned(job, found)
        with run.stop.at_once("before training"):
            built, steps = _built(job)
        with told(found):
            progress = resume(job, built, steps, found)
        run.stop.check("before training")
        if run.device == "cpu":
            _settle(built, _largest(job))
        progress = _fit(job, built, steps, progress)
        return _finish(job, built, steps, progress)


def _settle(built: Built, size: int) -> None:
    """Weights that lie in a file's small pages move into the pool's large ones, and `size` bytes more are at hand."""
    if memory.install():
        return
    for parameter in built.model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()
    memory.reserve(size)


def _largest(job: Job) -> int:
    """Bytes that come and go with the largest micro-batch."""
    lengths = np.sort(np.diff(job.train.starts))[-job.node.batch.rows :]
    most = job.choice.rows * job.node.data.max_length
    account = job.choice.account
    return int((account.activations + account.working) * min(1.0, lengths.sum() / most))


def read(node: Sft, run: Run) -> Job:
    """The data and the sizes of a stage, before any model is loaded.

    Raises:
        DataError: the data cannot be trained on.
        ResourceError: it cannot fit in memory.
    """
    resolved = whole_model(node.model)
    if notice := check_length(resolved, node.data.max_length, "data.max_length", node.model.rope):
        run.console.notice(notice)
    tokenizer = read_tokenizer(resolved, node.model.template, run.grants.code)
    aside = Quarantine(run.folder / "quarantine.jsonl")
    data = prepare(node.data.train, node.data, tokenizer, "data.train", aside, node.batch.rows)
    valid = prepare(node.data.valid, node.data, tokenizer, "data.valid", aside) if node.data.valid else None
    aside.tell(run.console)
    order = Order(node.seed, len(data), node.batch.rows)
    steps = node.steps or (node.epochs or 1) * order.steps_per_epoch
    kinds = types(node.precision, run.device)
    shape, choice = sizes(node, resolved, run.device)
    run.console.notice(_summary(data, valid, choice, kinds, steps))
    return Job(node, run, resolved, kinds, data, valid, choice, steps, order, shape)


def _summary(data: Prepared, valid: Prepared | None, choice: Choice, kinds: Types, steps: int) -> str:
    learned = data.counts["supervised tokens"] / data.counts["tokens"]
    parts = [
        f"{len(data)} examples of {data.counts['tokens'] / len(data):.0f} tokens ({learned:.0%} trained)",
        f"{len(valid)} to validate" if valid is not None else "",
        f"{steps} steps",
        kinds.name,
        f"{choice.rows} rows a forward",
        "recompute" if choice.recompute else "",
        f"about {choice.account.total / 2**20:.0f} MiB",
    ]
    dropped = [f"{reason} {n}" for reason, n in data.counts.items() if ":" in reason and n]
    return ", ".join(filter(None, [*parts, *dropped]))


def _built(job: Job) -> tuple[Built, Single]:
    node, grants = job.node, job.run.grants
    held = how(job.run.device, job.types, node.quant, node.adapter, grants.code, grants.nonfinite)
    made = build(job.resolved, node.model, held, node.adapter, job.choice.recompute, node.seed)
    if isinstance(node.data.packing, FirstFit) and not made.loaded.support.packed:
        raise DataError(made.loaded.support.reason, fix="set data.packing=none", key="data.packing")
    job.run.console.notice(
        f"{made.loaded.attention} attention, {sum(p.numel() for p in made.trained.values()):,} trained"
    )
    return made, stepper(made, node.optim.build(made.trained), job.types)


def _fit(job: Job, built: Built, steps: Single, start: Progress) -> Progress:
    node, run = job.node, job.run
    metrics = Lines(run.folder / "metrics.jsonl")
    built.model.train()
    plan = Plan(
        job.steps,
        job.order.steps_per_epoch,
        node.seed,
        node.optim.lr,
        node.optim.clip,
        node.schedule,
        node.guard,
        node.evaluate,
        node.checkpoint,
    )
    run.console.start("training", job.steps, start.step)
    with _loggers(job, start.step) as log:
        hooks = Hooks(
            data=partial(_step_data, job, built.loaded.support.packed),
            log=partial(_log, metrics, log),
            evaluate=partial(_measured, job, built, steps) if job.valid is not None else None,
            save=partial(_save, job, built, steps, metrics),
            asked_to_stop=lambda: run.stop.why,
            measure=partial(measure, job.shape, run.device, job.types.half, isinstance(node.adapter, Lora)),
            show=partial(_show, job),
        )
        try:
            return fit(steps, CrossEntropy(), plan, hooks, start)
        finally:
            run.console.end()


def _log(metrics: Lines, more: Any, line: dict[str, Any]) -> None:
    metrics.add(line)
    more(line)


def _step_data(job: Job, contexts: bool, index: int) -> StepData:
    epoch, ids = job.order.step(index)
    node, data = job.node, job.train
    packing: Packing = node.data.packing if contexts else NoPacking()
    batches = micro_batches(data, ids, packing, node.data.max_length, job.choice.rows, contexts, job.run.device)
    tokens = sum(data.length(i) for i in ids)
    supervised = sum(int((batch.weights > 0).sum()) for batch in batches)
    places, count = tuple(data.places[i] for i in ids), sum(data.supervised(i) for i in ids)
    return StepData(epoch, ids, batches, tokens, supervised, count, places)


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
    )


def _measured(job: Job, built: Built, steps: Single, step: int) -> dict[str, float]:
    """An evaluation whose lack of memory is called that, and no fault of its rows."""
    with out_of_memory_named(job.run.device, KNOB):
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


def _save(job: Job, built: Built, steps: Single, metrics: Lines, progress: Progress, scheduled: bool) -> None:
    node, samples = job.node, Lines(job.run.folder / "samples.jsonl")
    if scheduled:  # before the checkpoint, which remembers how long the file is with this line in it
        metrics.add({"event": "save", "step": progress.step, "path": f"checkpoints/step-{progress.step}"})
    metrics.sync()
    samples.sync()
    facts = {
        "step": progress.step,
        "progress": asdict(progress),
        "identity": identity(job, built.loaded.attention),
        "micro_batch": job.choice.rows,
        "recompute": job.choice.recompute,
        "metrics_bytes": metrics.size(),
        "samples_bytes": samples.size(),
    }
    state.save(job.checkpoints, progress.step, steps.state(), facts)
    state.prune(job.checkpoints, node.checkpoint.keep, progress.best_step)


def _show(job: Job, line: dict[str, Any]) -> None:
    console = job.run.console
    if line["event"] == "evaluate":
        console.notice(f"step {line['step']}: valid.loss {line['valid.loss']:.4f}")
        return
    gigabytes = line["peak_memory_bytes"] / 2**30
    figures = f"loss {line['loss']:.4f}, {line['tokens_per_second']:.0f} tokens/s, peak {gigabytes:.2f} GiB"
    console.step("training", line["step"], job.steps, figures)


@contextmanager
def _loggers(job: Job, done: int) -> Iterator[Any]:
    """TensorBoard beside the metrics, where asked for."""
    if not job.node.log:
        yield lambda line: None
        return
    with writer(job.run.folder / "tensorboard", done) as log:
        yield log


def _finish(job: Job, built: Built, steps: Single, progress: Progress) -> Artifact:
    """The result: the best checkpoint where one was asked for, else the last."""
    run, node = job.run, job.node
    if progress.best_step not in (None, progress.step):
        steps.load(state.load(job.checkpoints / f"step-{progress.best_step}")[0])
        run.console.notice(f"the result is step {progress.best_step}, the best by {node.checkpoint.best}")
    export(built.model, built.loaded.tokenizer, run.folder / "model", job.resolved, node.quant, node.model.rope)
    write_report(run.folder)
    return publish(
        run.folder,
        {
            "kind": node.kind,
            "base": job.resolved.facts(),
            "recipe_digest": run.recipe_digest,
            "recipe": run.values,
            "data": {"train": job.train.digest, "valid": job.valid.digest if job.valid is not None else ""},
            "data_files": job.train.files,
            "counts": job.train.counts,
            "template": template_digest(built.loaded.tokenizer),
            "packages": packages(),
            "kernels": rows() if run.device == "cpu" else {},
            "processor": processor(),
            "seed": node.seed,
            "threads": run.threads,
            "device": run.device,
            "attention": built.loaded.attention,
            "precision": job.types.name,
            "micro_batch": job.choice.rows,
            "recompute": job.choice.recompute,
            "samples": len(job.train),
            "step": progress.step,
            "best_step": progress.best_step,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        },
    )
