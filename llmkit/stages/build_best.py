"""`kind: best_of` at work: prompts to answers with scores, line by line, and of those to rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from llmkit.build.held import Here
from llmkit.core.artifact import Artifact, publish
from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.core.seed import mixed
from llmkit.data.asked import Asked, asked_of
from llmkit.data.node import Data
from llmkit.data.order import spread
from llmkit.data.prompted import counted, flat
from llmkit.inference.node import OpenAi
from llmkit.inference.request import Ask, Completion, Prompt
from llmkit.inference.writer import Writer
from llmkit.models.resolve import Resolved, resolve
from llmkit.models.tokenizer import read_tokenizer
from llmkit.rl.bench import Bench
from llmkit.rl.columns import check_columns
from llmkit.rl.rewards_node import files_of, models_of
from llmkit.rl.sample import Sample
from llmkit.rl.scoring import Scores, score
from llmkit.stages.best_of import BestOf
from llmkit.stages.best_rows import kept
from llmkit.stages.build_inference import open_model
from llmkit.stages.known import known
from llmkit.stages.report import write_report, write_reports

AT_ONCE = 16
"""Prompts whose answers are scored together."""


def best_of(node: BestOf, run: Run) -> Artifact:
    """Answers, scores and keeps; leaves rows, figures and the manifest.

    Raises:
        DataError: rows cannot be read, or an answer has no score.
        ModelError: the model cannot be loaded.
        Stopped: someone asked; what is there stays, and is gone on from.
    """
    torch.set_num_threads(run.threads)
    resolved = resolve(node.model)
    tokenizer = read_tokenizer(resolved, node.model, run.grants.code)
    data = Data(train=node.data, system=node.system, max_length=node.max_length)
    asked = some(asked_of(node.data, data, tokenizer, "data"), node.rows)
    check_columns(node.reward, asked.columns, asked.places)
    lines = Lines(run.folder / "answers.jsonl")
    of = _facts(node, run, resolved, asked)
    done = _done(lines, of)
    if done < len(asked):
        with Bench(run.grants, run.device, node.precision) as bench:
            score(node.rewards, [], bench)  # what is not allowed or not there is told before anything is made
            _begin(lines, of, done)
            _answered(node, run, asked, lines, bench, done)
    reports = kept(node, run, asked, lines)
    write_reports(run, reports)
    write_report(run.folder)
    facts = {
        "kind": node.kind,
        "model": resolved.facts(),
        "recipe_digest": run.recipe_digest,
        "recipe": run.values,
        "data": asked.digest,
        "counts": dict(asked.counts),
        "reports": [vars(report) for report in reports],
    }
    return publish(run.folder, facts)


def some(asked: Asked, most: int | None) -> Asked:
    """At most so many of the prompts, evenly apart."""
    ids = spread(len(asked), most)
    tokens, weights, starts = flat([(asked.example(at)[0].tolist(), []) for at in ids])
    made = replace(asked, ids=tokens, weights=weights, starts=starts, rows=[asked.rows[at] for at in ids])
    places, columns = [asked.places[at] for at in ids], [asked.columns[at] for at in ids]
    return counted(replace(made, places=places, columns=columns))


def _facts(node: BestOf, run: Run, resolved: Resolved, asked: Asked) -> dict[str, Any]:
    """What answers and scores depend on: those of another recipe are not gone on from."""
    others = known(models_of(node.reward), files_of(node.reward))
    said = [run.recipe_digest, resolved.sha256, asked.digest, others]
    return {"of": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def _done(lines: Lines, of: Mapping[str, Any]) -> int:
    """How many prompts are answered already; none where the file is of something else."""
    first, *rest = lines.read() or [{}]
    return len(rest) if first == of else 0


def _begin(lines: Lines, of: Mapping[str, Any], done: int) -> None:
    """Makes room for what follows the prompts that are done: a torn last line is made again."""
    if done:
        lines.cut(lines.path.read_bytes().rfind(b"\n") + 1)
    else:
        lines.cut(0)
        lines.add(of)


def _answered(node: BestOf, run: Run, asked: Asked, lines: Lines, bench: Bench, done: int) -> None:
    """Answers all prompts from `done` on, scores them, and writes a line for each."""
    run.console.start("prompts", len(asked), done)
    waiting: list[tuple[int, Completion]] = []
    sums: list[float] = []

    def settle() -> None:
        samples = [one for at, made in waiting for one in _samples(asked, at, made)]
        found = score(node.rewards, samples, bench)
        for group, (at, made) in enumerate(waiting):
            lines.add(_line(asked, at, made, found, group * node.samples))
        sums.extend(found.total)
        figures = f"{sum(sums) / max(1, len(sums)):.3f} a reward"
        run.console.step("prompts", waiting[-1][0] + 1, len(asked), figures)
        waiting.clear()

    with closing(_writer(node, run)) as writer:
        for at, made in enumerate(writer.each(_asks(node, asked, done)), done):
            waiting.append((at, made.sound()))
            if len(waiting) == AT_ONCE or at + 1 == len(asked):
                settle()
            run.stop.check("while answers are made")
    run.console.end()


def _writer(node: BestOf, run: Run) -> Writer:
    if isinstance(node.generator, OpenAi):
        return node.generator.open()
    loaded, kinds = open_model(node.model, run.device, node.precision, run.grants, node.quant)
    return node.generator.open(Here(loaded, mixed=kinds.mixed, device=run.device))


def _asks(node: BestOf, asked: Asked, first: int) -> Iterator[Ask]:
    """Each prompt by a seed of its own, so that answers do not depend on where a run was interrupted."""
    for at in range(first, len(asked)):
        ids, row = tuple(asked.example(at)[0].tolist()), asked.rows[at]
        most = min(node.sampling.max_tokens, node.max_length - len(ids))
        own = replace(
            node.sampling,
            n=node.samples,
            max_tokens=most,
            min_tokens=min(node.sampling.min_tokens, most),
            seed=mixed(node.seed, node.sampling.seed, at) >> 32,
        )
        said = row.question if isinstance(row.question, str) else tuple(row.question)
        yield Ask(Prompt(ids, said, row.tools), own)


def _samples(asked: Asked, at: int, made: Completion) -> list[Sample]:
    file, line = asked.places[at]
    return [
        Sample(
            asked.rows[at].question, one.text, one.token_ids, one.finish_reason, asked.columns[at], file, line, (), at
        )
        for one in made.outputs
    ]


def _line(asked: Asked, at: int, made: Completion, found: Scores, first: int) -> dict[str, Any]:
    """A prompt with its answers and all that they are worth."""
    answers = [
        {
            "text": one.text,
            "tokens": len(one.token_ids),
            "finish_reason": one.finish_reason,
            "score": found.total[first + place],
            "scores": {name: scores[first + place] for name, scores in found.each.items()},
        }
        for place, one in enumerate(made.outputs)
    ]
    place = ":".join(map(str, asked.places[at]))
    return {"row": at, "place": place, "answers": answers, "figures": found.beside()}
