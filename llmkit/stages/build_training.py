"""Puts a training stage together: with `measured.py` and `finished.py` the only place that knows all its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from llmkit_kernels import memory

from llmkit.adapters.limits import virtual_tokens
from llmkit.build import float8
from llmkit.build.context import by_context
from llmkit.build.precision import Types, types
from llmkit.build.training import Built, build, how, parts
from llmkit.checkpoint.mirror import Mirror
from llmkit.checkpoint.saver import Keep, Saver
from llmkit.core.artifact import Artifact
from llmkit.core.errors import DataError, Stopped
from llmkit.core.memory import out_of_memory_named
from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.core.types import Batch
from llmkit.data.batches import micro_batches
from llmkit.data.feed import Feed, Known
from llmkit.data.groups import Groups
from llmkit.data.node import FirstFit, NoPacking, Packing
from llmkit.data.prepare import Prepared
from llmkit.models.load import DTYPES
from llmkit.models.positions import check_length
from llmkit.models.probe import Support
from llmkit.models.tokenizer import read_tokenizer
from llmkit.parallel.alike import compare
from llmkit.parallel.degrees import Deal
from llmkit.parallel.grid import grid
from llmkit.parallel.group import agreed, lead
from llmkit.parallel.steps import Adaptive, Steps
from llmkit.plan.choice import RECOMPUTE, Choice
from llmkit.rl.bench import Bench
from llmkit.stages.attempts import Attempts
from llmkit.stages.finished import finish
from llmkit.stages.foreseen import with_distance
from llmkit.stages.job import Job
from llmkit.stages.known import known, known_code
from llmkit.stages.levelled import levelled, room_seen
from llmkit.stages.lint_table import brief, keep, linted, served
from llmkit.stages.measured import measured
from llmkit.stages.process import begin
from llmkit.stages.progressed import show
from llmkit.stages.pulse import Pulse
from llmkit.stages.quarantine import Quarantine
from llmkit.stages.resume import facts, find, identity, pinned, resume, told
from llmkit.stages.sizes import sizes, whole_model
from llmkit.stages.speed import measure
from llmkit.stages.training import Training
from llmkit.train.fit import Hooks, Plan, Progress, StepData, fit
from llmkit.train.logs import Log1
from llmkit.train.optimizing import matched

ALL = Deal((0,), 1)


def train(node: Training, run: Run) -> Artifact:
    """Trains a stage, or goes on with one that was interrupted."""
    begin(run, node.deterministic)
    with out_of_memory_named(run.device, node.knob):
        run.peers.phase("data")
        first = run.ranks.local == 0  # of each host: it fills the cache
        with run.stop.at_once("before training"), lead(run.peers, first):
            job = read(node, run)
        agreed(run.peers, facts(job) | known_code(node))
        room_seen(run.peers)
        job = levelled(job)
        found = find(job)
        attempts = Attempts(run.folder) if run.main and run.ranks.world > 1 else None
        if attempts is not None:
            attempts.begin()
        with told(found):
            job = pinned(job, found)
        with run.stop.at_once("before training"):
            built, steps = _built(job)
        with job.bench:
            with node.feeding(job, built, steps) as feed:
                job = replace(job, feed=feed)
                with told(found):
                    progress = resume(job, built, steps, found)
                run.stop.check("before training")
                if run.device == "cpu":
                    _settle(built, _largest(job))
                progress = _fit(job, built, steps, progress, attempts)
            run.peers.phase("exit", progress.step)
            return finish(job, built, steps, progress)


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
    lengths = np.sort(np.diff(job.train.starts))[-job.node.batch.examples :]
    most = job.choice.rows * job.node.row_tokens
    if not len(lengths) or job.node.batch.tokens:  # of a stream, no length is known
        lengths = np.array([most])
    account = job.choice.account
    return int((account.activations + max(account.logits, account.working)) * min(1.0, lengths.sum() / most))


def read(node: Training, run: Run) -> Job:
    """The data and the sizes of a stage, before any model is loaded.

    Raises:
        DataError: the data cannot be trained on.
        ResourceError: it cannot fit in memory.
    """
    resolved = whole_model(node.model)
    longest = node.data.max_length + virtual_tokens(node.adapter)
    if notice := check_length(resolved, longest, "data.max_length", node.model.rope):
        run.console.notice(notice)
    tokenizer = read_tokenizer(resolved, node.model, run.grants.code)
    aside = Quarantine(run.scratch / "quarantine.jsonl")
    feed, data = _train(node, run, tokenizer, aside)
    held = node.data.sources("valid")
    valid = node.answered(node.examples(held, tokenizer, "data.valid", aside), run, "data.valid") if held else None
    aside.tell(run.console)
    for made in (data, valid):
        if made is not None and len(made):
            node.reaches(resolved, made)
    found = linted(node.data, data, valid, served(resolved, node.model, tokenizer, run.grants.code))
    if run.main:
        keep(run.folder, found, data)
    if notice := brief(found):
        run.console.notice(notice)
    steps = node.steps or (node.epochs or 1) * feed.steps_per_epoch
    kinds = types(node.types_name, run.device)
    shape, choice = sizes(node, resolved, run.device, run.ranks)
    run.console.notice(_summary(data, valid, choice, kinds, steps, _spread(node, run.ranks.world)))
    loss, bench = node.objective(data), Bench(run.grants, run.device)
    others = known(node.others(), node.files_beside()) | known_code(node)
    return Job(node, run, resolved, kinds, data, valid, choice, steps, feed, shape, loss, bench, others)


def _train(node: Training, run: Run, tokenizer: Any, aside: Quarantine) -> tuple[Feed, Prepared]:
    """What steps draw from, and what is known of it before training: of streams, what they are known by."""
    if node.data.streaming:
        marks = {path: said for source in node.data.train for path, said in source.marks().items()}
        none: Any = np.empty(0, np.int64)
        return node.stream(tokenizer, aside), Prepared(none, none, np.zeros(1, np.int64), (), files=marks)
    data = node.examples(node.data.sources("train"), tokenizer, "data.train", aside, node.batch.least)
    data = node.answered(data, run, "data.train")
    return Known(data, node.order(data)), data


def _spread(node: Training, world: int) -> str:
    """What `parallel` came to, where there are several ranks."""
    if world == 1:
        return ""
    degrees = asdict(node.parallel.degrees(world))
    said = ", ".join(f"{name} {size}" for name, size in degrees.items() if size > 1)
    return f"{world} ranks by {node.parallel.resolve(world).kind} ({said})"


def _summary(data: Prepared, valid: Prepared | None, choice: Choice, kinds: Types, steps: int, spread: str) -> str:
    known = "examples as they are read"
    if len(data):
        learned = data.counts["supervised tokens"] / data.counts["tokens"]
        known = f"{len(data)} examples of {data.counts['tokens'] / len(data):.0f} tokens ({learned:.0%} trained)"
    parts = [
        known,
        f"{len(valid)} to validate" if valid is not None else "",
        f"{steps} steps",
        spread,
        kinds.name,
        f"{choice.rows} rows a forward",
        f"{RECOMPUTE[choice.recompute]} recompute" if choice.recompute else "",
        f"about {choice.account.peak / 2**20:.0f} MiB",
    ]
    dropped = [f"{reason} {n}" for reason, n in data.counts.items() if ":" in reason and n]
    return ", ".join(filter(None, [*parts, *dropped]))


def _built(job: Job) -> tuple[Built, Steps]:
    node, grants = job.node, job.run.grants
    held = how(job.run.device, job.types, node.quant, node.adapter, grants.code, grants.nonfinite)
    cut = node.parallel.cut(job.run.ranks.world)
    blind = node.blind() and job.types.compute != "fp8"
    held, say = replace(held, head=node.head(job.train), deferred=cut and blind), job.run.console.notice
    made = build(job.resolved, node.model, held, node.adapter, job.choice.recompute, node.seed, say)
    if isinstance(node.data.packing, FirstFit) and not made.loaded.support.packed:
        raise DataError(made.loaded.support.reason, fix="set data.packing=none", key="data.packing")
    if len(job.train.breaks) and not made.loaded.support.packed:
        raise DataError(made.loaded.support.reason, fix="set documents=joined", key="documents")
    if cut:
        say(made.loaded.deferred.say)
    made = node.around(made, job.train, job.run)
    if isinstance(job.train, Groups):
        say("prompts are computed once" if made.loaded.support.tree else "each completion has a prompt of its own")
    job.run.console.notice(
        f"{made.loaded.attention} attention, {sum(p.numel() for p in made.trained.values()):,} trained"
    )
    with torch.autocast(job.run.device, DTYPES[job.types.short], enabled=job.types.mixed):
        node.adapter.prepare(made.model, _first(job, made.loaded.support), made.scored.hidden)
    if node.neftune:  # after `prepare`, which sees the data as it is
        made.scored.disturb(node.neftune)
    if job.types.compute == "fp8":
        job.run.console.notice(f"{float8.convert(made.model)} linears in fp8")
    for glob, tensors, size in matched(node.optim, made.trained):
        job.run.console.notice(f"optim.groups: {glob} holds for {tensors} tensors, {size:,} parameters")
    levers, factors = node.memory, {name: node.rate(name) for name in made.trained}
    build_optimizer = partial(node.optim.build, factors=factors, apart=levers.optimizer_in_backward)
    given = parts(made, build_optimizer, job.types, levers.optimizer_in_backward, levers.offload_activations)
    world = job.run.ranks.world
    given = replace(given, virtual=node.parallel.shards(world, node.deterministic), say=job.run.console.notice)
    ranks = grid(node.parallel.degrees(world), job.run.device, job.run.peers) if world > 1 else None
    given = by_context(given, made.loaded, node.parallel.context_method, ranks)
    steps = node.parallel.stepper(given, ranks)
    return replace(made, trained=steps.params), steps


def _first(job: Job, support: Support) -> Iterator[Batch]:
    """The training data from its beginning, whatever step the run goes on from: on every rank all of it."""
    return (batch for index in range(job.steps) for batch in _step_data(job, support, index, ALL).batches)


def _fit(job: Job, built: Built, steps: Steps, start: Progress, attempts: Attempts | None) -> Progress:
    node, run = job.node, job.run
    metrics = Lines(run.scratch / "metrics.jsonl")
    built.model.train()
    plan = Plan(
        job.steps,
        job.feed.steps_per_epoch,
        node.seed,
        node.optim.lr,
        node.optim.clip,
        node.schedule,
        node.watched,
        node.evaluate,
        node.checkpoint,
        bool(node.larger_better(node.checkpoint.best or "")),
    )
    pulse = Pulse(run, metrics.add)
    run.console.start("training", job.steps, start.step)
    with _loggers(job, start.step) as log, run.stop.together(run.peers), _saver(job) as saver:
        hooks = Hooks(
            data=partial(_entered, job, steps, built.loaded.support, attempts),
            log=partial(_log, job, metrics, log, pulse),
            evaluate=partial(measured, job, built, steps) if job.valid is not None else None,
            save=partial(_save, job, built, steps, metrics, saver),
            verify=partial(_verify, job, built, steps),
            asked_to_stop=run.stop.asked,
            measure=partial(measure, job.shape, run.device, job.types.half, node.adapter.frozen_base, run.ranks.world),
            show=partial(show, job),
            phase=pulse.phase,
            elapsed=run.peers.share,
            alone=run.ranks.world == 1,
        )
        try:
            done = fit(steps, job.loss, plan, hooks, start)
        except Stopped:
            _forget(attempts)
            raise
        finally:
            run.console.end()
            pulse.end()
    _forget(attempts)
    return done


def _forget(attempts: Attempts | None) -> None:
    if attempts is not None:
        attempts.end()


def _entered(job: Job, steps: Steps, support: Support, attempts: Attempts | None, index: int) -> StepData:
    data = _step_data(job, support, index)
    if attempts is not None:
        attempts.enter(index + 1, data)
    return with_distance(job, steps, support, index, data) if job.node.needs_distance else data


def _verify(job: Job, built: Built, steps: Steps, step: int, due: bool) -> None:
    """What other ranks hold copies of is compared, where it is due."""
    every, world = job.node.guard.checksum, job.run.ranks.world
    if not every or world == 1 or not (due or step % every == 0):
        return
    held, spread = dict(steps.state()), job.node.parallel.degrees(world)
    if spread.replicate == world:  # else the frozen ones are cut too
        frozen = ((name, p) for name, p in built.model.named_parameters() if not p.requires_grad)
        held |= {f"frozen/{name}": p.detach() for name, p in frozen}
    compare(job.run.peers, held, step)


def _log(job: Job, metrics: Lines, more: Any, pulse: Pulse, line: dict[str, Any]) -> None:
    if counts := job.feed.counts() if line["event"] == "train" else {}:
        unusable = sum(n for reason, n in counts.items() if reason.startswith(("unusable", "quarantined")))
        line |= {"rows_read": counts.get("rows", 0), "rows_unusable": unusable}
    metrics.add(line)
    more(line)
    if line["event"] == "train":
        pulse.stepped(line["step"], line["seconds"])


def _step_data(job: Job, support: Support, index: int, dealt: Deal | None = None) -> StepData:
    """What one step sees of its data: this rank's shares, or those that are dealt."""
    node, drawn = job.node, job.feed.step(index)
    data, rows = drawn.data, drawn.rows
    packing: Packing = node.data.packing if support.packed else NoPacking()
    dealt = dealt or node.parallel.deal(job.run.ranks, node.deterministic)
    contexts, size = support.packed, node.row_tokens
    make = partial(micro_batches, data, rows, packing, size, job.choice.rows, contexts, job.run.device)
    shares = [make(share, dealt.count, support.tree) for share in dealt.shares]
    numbers = [
        share + turn * dealt.count
        for share, made in zip(dealt.shares, shares, strict=True)
        for turn in range(len(made))
    ]
    tokens = sum(data.length(i) for i in rows)
    supervised = sum(int((data.sample(i)[2] > 0).sum()) for i in rows)
    places, count = tuple(data.places[i] for i in rows), sum(data.supervised(i) for i in rows)
    batches = [batch for made in shares for batch in made]
    return StepData(drawn.epoch, drawn.ids, batches, tokens, supervised, count, numbers, places)


def _saver(job: Job) -> Saver:
    run, said = job.run, job.node.checkpoint
    mirror = Mirror(said.mirror, job.checkpoints, run.console.notice) if said.mirror and run.main else None
    return Saver(job.checkpoints, run.console.notice, run.peers, said.background, mirror)


def _save(
    job: Job, built: Built, steps: Steps, metrics: Lines, saver: Saver, progress: Progress, scheduled: bool
) -> None:
    samples = Lines(job.run.scratch / "samples.jsonl")
    if scheduled:  # before the checkpoint, which remembers how long the file is with this line in it
        metrics.add({"event": "save", "step": progress.step, "path": f"checkpoints/step-{progress.step}"})
    facts = {
        "step": progress.step,
        "progress": asdict(progress),
        "identity": identity(job, built.loaded.attention),
        "micro_batch": job.choice.rows,
        "recompute": job.choice.recompute,
        "feed": job.feed.state(progress.step),
        "metrics_bytes": metrics.size(),
        "samples_bytes": samples.size(),
    }
    learned = job.loss.state() if isinstance(job.loss, Adaptive) else {}
    keep = Keep(job.node.checkpoint.keep, progress.best_step, first=(metrics.sync, samples.sync))
    saver.save(progress.step, {**steps.state(), **learned}, facts, keep)


@contextmanager
def _loggers(job: Job, done: int) -> Iterator[Log1]:
    """The trackers that were asked for, as one."""
    with ExitStack() as stack:
        folder, values = job.run.folder, job.run.values
        trackers = job.node.log if job.run.main else ()
        logs = [stack.enter_context(node.open(folder, done, values)) for node in trackers]

        def log(line: dict[str, Any]) -> None:
            for each in logs:
                each(line)

        yield log
