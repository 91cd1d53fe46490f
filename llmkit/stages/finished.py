"""What a training stage leaves: the model, the report, the manifest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from llmkit_kernels import memory
from llmkit_kernels.table import rows

from llmkit.build.exactness import exactness
from llmkit.build.training import Built
from llmkit.checkpoint import state
from llmkit.checkpoint.identity import packages, processor
from llmkit.core import records
from llmkit.core.artifact import Artifact, publish
from llmkit.core.memory import out_of_memory_named
from llmkit.data.prepare import template_digest
from llmkit.models.export import write
from llmkit.parallel.steps import Steps
from llmkit.plan.choice import RECOMPUTE
from llmkit.stages.job import Job
from llmkit.stages.measured import generator, subject
from llmkit.stages.report import write_report, write_reports
from llmkit.stages.training import Training
from llmkit.train.fit import Progress


def _conclude(job: Job, built: Built, steps: Steps) -> None:
    """What the result says of the validation rows, where the stage has a table of it."""
    if job.valid is None or type(job.node).final is Training.final:
        return
    with job.run.stop.at_once("after training"), out_of_memory_named(job.run.device, job.node.knob):
        rows, reports = job.node.final(subject(job, built, steps), job.valid)
    if rows and job.run.main:
        records.write(job.run.folder / "predictions.jsonl", rows)
        write_reports(job.run, reports)


def _exact(job: Job, built: Built) -> dict[str, str]:
    """Whether the samples depend on what was made beside them, where there are any."""
    if not (job.run.folder / "samples.jsonl").is_file():
        return {}
    return {"exact": exactness(built.model, generator(job, built), job.types.mixed)}


def _write(job: Job, built: Built, labels: Sequence[str], folder: Path) -> None:
    """The files of the model, into a folder."""
    node, tokenizer = job.node, built.loaded.tokenizer
    write(built.model, tokenizer, folder, job.resolved, node.quant, node.model.rope, labels)


def finish(job: Job, built: Built, steps: Steps, progress: Progress) -> Artifact:
    """The result: the best checkpoint where one was asked for, else the last."""
    run, node = job.run, job.node
    if progress.step < job.steps:
        what = f"no better {node.checkpoint.best} in {progress.stale} evaluations"
        run.console.notice(f"stopped early at step {progress.step} of {job.steps}: {what}")
    if progress.best_step not in (None, progress.step):
        steps.load(state.load(job.checkpoints / f"step-{progress.best_step}", run.peers)[0])
        run.console.notice(f"the result is step {progress.best_step}, the best by {node.checkpoint.best}")
    labels = built.loaded.head.labels if built.loaded.head is not None else ()
    steps.settle()
    _conclude(job, built, steps)
    steps.assemble((built.model, *built.beside), run.peers)
    if not run.main:
        return Artifact(run.folder)
    node.adapter.finish(built.model)
    memory.trim()  # what steps took is free by now, and the writing of weights copies them
    node.leave(built, run.folder / "model", partial(_write, job, built, labels))
    if node.model.rope is not None and hasattr(built.model, "peft_config"):
        run.console.notice("the base of the adapter is scaled, which peft alone does not know: merge it for use there")
    write_report(run.folder)
    made = publish(
        run.folder,
        {
            "kind": node.kind,
            "base": job.resolved.facts(),
            "recipe_digest": run.recipe_digest,
            "recipe": run.values,
            "data": {"train": job.train.digest, "valid": job.valid.digest if job.valid is not None else ""},
            "data_files": job.train.files,
            "counts": job.train.counts | job.feed.counts(),
            "template": template_digest(built.loaded.tokenizer),
            "packages": packages(),
            "kernels": rows() if run.device == "cpu" else {},
            "processor": processor(),
            "seed": node.seed,
            "threads": run.threads,
            "ranks": run.ranks.world,
            "parallel": {
                "strategy": node.parallel.resolve(run.ranks.world).kind,
                **asdict(node.parallel.degrees(run.ranks.world)),
            },
            "device": run.device,
            "attention": built.loaded.attention,
            "precision": job.types.name,
            "micro_batch": job.choice.rows,
            "recompute": RECOMPUTE[job.choice.recompute],
            "samples": len(job.train) or progress.step * node.batch.examples,
            "step": progress.step,
            "best_step": progress.best_step,
            "labels": list(labels),
            **_exact(job, built),
            "stopped_early": progress.step < job.steps,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        },
    )
    if node.push is not None:
        run.console.notice(f"pushed: {node.push.send(run.folder)}")
    return made
