"""Going on with a training stage: from which checkpoint, whether it is the same run, and what is put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from llmkit_kernels.table import rows

from llmkit.build.training import Built
from llmkit.checkpoint import mirror, state
from llmkit.checkpoint.agree import agree
from llmkit.checkpoint.held import Held
from llmkit.checkpoint.identity import compare, packages, processor, unmeant
from llmkit.core.errors import LlmkitError, ModelError, RecipeError, ResourceError, without_logins
from llmkit.core.metrics import Lines
from llmkit.parallel.steps import Adaptive, Steps
from llmkit.stages.job import Job
from llmkit.train.fit import Progress
from llmkit.train.guard import Watch

Found = tuple[Path, Held, dict[str, Any]]
NO_MATTER = ("background", "mirror")
"""What of `checkpoint` changes nothing of a result."""


def find(job: Job) -> Found | None:
    """Where to go on from: the checkpoint that was named, else the newest whole one, here or in the mirror."""
    if job.run.resume == "auto":
        _bring(job)
        return state.newest(job.checkpoints, job.run.console.notice, job.run.peers)
    if job.run.resume == "never":
        _vacant(job)
        return None
    path = Path(job.run.resume)
    return (path, *state.load(path, job.run.peers))


def _bring(job: Job) -> None:
    """Where there is no checkpoint here, brings the mirror's newest.

    Raises:
        ResourceError: it cannot be read: to begin anew beside it may be wrong.
    """
    url, fault = job.node.checkpoint.mirror, None
    if url and job.run.main and not state.steps(job.checkpoints):
        try:
            mirror.fetch(url, job.checkpoints, job.run.console.notice, lambda facts: facts["progress"]["best_step"])
        except LlmkitError as cause:
            fault = cause
    agree(job.run.peers, fault)


def _vacant(job: Job) -> None:
    """Sees to it that a run which begins anew takes the place of no other in the mirror: what is there would go.

    Raises:
        RecipeError: checkpoints of a run by this name are there.
    """
    url, there = job.node.checkpoint.mirror, False
    if url and job.run.main:
        with suppress(ResourceError):  # it cannot be read: nothing can be copied there either, which is told then
            there = mirror.occupied(url, job.checkpoints)
    if there:
        what = f"{without_logins(url or '')} has checkpoints of a run called {job.run.folder.absolute().name}"
        raise RecipeError(what, fix="name another out, or remove them", key="checkpoint.mirror")


def pinned(job: Job, found: Found | None) -> Job:
    """The job with the sizes that it began with: the machine may have another amount of free memory now.

    What the recipe says anew is taken as it says, where that is accepted.
    """
    if found is None:
        return job
    facts, choice = found[2], job.choice
    before, now = facts["identity"]["recipe"], job.run.values
    if before["micro_batch"] == now["micro_batch"]:
        choice = replace(choice, rows=facts["micro_batch"])
    if before["memory"] == now["memory"]:
        choice = replace(choice, recompute=facts["recompute"])
    return replace(job, choice=choice)


@contextmanager
def told(found: Found | None) -> Iterator[None]:
    """Names the checkpoint whose facts are not those that a save of ours writes."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as cause:
        if found is None:
            raise
        what = f"says what no save of ours says ({cause!r:.120})"
        raise ModelError(what, fix=state.FIX, file=str(found[0] / "state.json")) from cause


def facts(job: Job) -> dict[str, Any]:
    """What the ranks of a run must share before a model is loaded, beside the recipe."""
    return {
        "data": {"train": job.train.digest, "valid": job.valid.digest if job.valid is not None else ""},
        "packages": packages(),
    }


def identity(job: Job, attention: str) -> dict[str, Any]:
    """What a resumed run must share with the one that it continues."""
    return {
        **facts(job),
        "recipe": _lasting(job.run.values),
        "environment": job.run.environment,
        "model": job.resolved.facts(),
        **job.known,
        "files": {**job.train.files, **(job.valid.files if job.valid is not None else {})},
        "kernels": rows() if job.run.device == "cpu" else {},
        "attention": attention,
        "threads": job.run.threads,
        "device": job.run.device,
        "processor": processor() if job.run.device == "cpu" else torch.cuda.get_device_name(),
    }


def _lasting(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what may change from one start of a run to the next."""
    found = {k: v for k, v in values.items() if k not in ("out", "parallel")}
    if values["deterministic"]:  # its bits are those of these shards
        found["parallel"] = {"virtual": values["parallel"]["virtual"]}
    if "evaluate" in found:  # samples are looked at: nothing depends on them
        found["evaluate"] = {k: v for k, v in found["evaluate"].items() if k not in ("samples", "max_tokens")}
    return found | {"checkpoint": {k: v for k, v in found["checkpoint"].items() if k not in NO_MATTER}}


def resume(job: Job, built: Built, steps: Steps, found: Found | None) -> Progress:
    """The state of the checkpoint, or the beginning."""
    metrics, samples = Lines(job.run.scratch / "metrics.jsonl"), Lines(job.run.scratch / "samples.jsonl")
    if found is None:
        metrics.cut(0)
        samples.cut(0)
        job.feed.begin({})  # an adapter may have drawn from it for its start
        return Progress()
    path, tensors, facts = found
    other = job.run.ranks.world != len(tensors.manifest.parts)
    accepted = (*job.run.grants.accept, *(("threads",) if other else ()))  # launchers give each rank its share of them
    mine = identity(job, built.loaded.attention)
    for strange in unmeant(facts["identity"], mine, job.run.grants.accept):
        job.run.console.notice(strange)
    for changed in compare(facts["identity"], mine, accepted):
        job.run.console.notice(f"going on with a change: {changed}")
    said = dict(facts["progress"])
    watch = Watch(tuple(said["watch"]["losses"]), said["watch"]["streak"])
    progress = Progress(**{**said, "watch": watch})
    before: Any = facts["identity"]["recipe"]["optim"]
    now: Any = job.run.values["optim"]
    if any(before.get(key) != now.get(key) for key in job.node.optim.shaping):  # accepted above
        tensors = tensors.without("optim/")
        job.run.console.notice("another optimizer: its state begins anew")
    steps.load(tensors)
    job.feed.begin(facts["feed"])
    if isinstance(job.loss, Adaptive):
        own = {key: value.shape for key, value in job.loss.state().items()}
        if {key: tensors.shape(key) for key in own if key in tensors} == own:
            job.loss.load(tensors)
        else:  # accepted above: another loss, or other groups of rows
            job.run.console.notice("another loss: its state begins anew")
    progress = _alone(job, progress)
    metrics.cut(facts["metrics_bytes"] if job.run.main else 0)
    samples.cut(facts["samples_bytes"] if job.run.main else 0)
    job.run.console.notice(f"going on from step {progress.step} of {job.steps} ({path.name})")
    return progress


def _alone(job: Job, progress: Progress) -> Progress:
    """Where to go on from, with no checkpoint in the way that is not of this course of the run."""
    notice, kept = job.run.console.notice, job.run.peers.share(state.steps(job.checkpoints))  # a host may see less
    later = state.set_aside(job.checkpoints, progress.step) if job.run.main else []
    job.run.peers.barrier("resume")
    if later:
        notice(f"checkpoints of later steps ({', '.join(map(str, later))}) go with the next save")
    if progress.best_step is None or progress.best_step in kept:
        return progress
    notice(f"the best so far, step {progress.best_step}, is gone: the best is looked for from here")
    return replace(progress, best=None, best_step=None)
