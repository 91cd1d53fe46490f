"""A model's own answers to what rows ask, for what learns to draft for it: made once, and kept beside the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace

from llmkit.build.held import Here
from llmkit.core.errors import DataError
from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.data.prepared import Prepared
from llmkit.data.prompted import answered
from llmkit.inference.generate import ends
from llmkit.inference.request import Ask, Prompt, ended, telling
from llmkit.models.node import ModelRef, Quant
from llmkit.models.resolve import resolve
from llmkit.stages.build_inference import open_model
from llmkit.train.answers import Made


def own_answers(
    asked: Prepared,
    how: Made,
    model: ModelRef,
    precision: str,
    longest: int,
    run: Run,
    key: str,
    quant: Quant | None = None,
    place: str = "drafter.answers",
) -> Prepared:
    """The prompts with the model's own answers behind them, of `longest` tokens together at most. `quant`: how it is
    held; `place`: the key that says so.

    Those that an earlier start of the run made are read from its folder: a text depends on its prompt and its seed, so
    that the others come to be what they would have been.

    Raises:
        DataError: no prompt has an answer.
        ModelError: the model cannot be loaded, or is none that the engine runs.
    """
    lines = Lines(run.scratch / f"answers.{key}.jsonl")
    made = _kept(lines, asked, how, model, precision, longest, quant)
    if len(made) < len(asked):
        run.console.start(f"answers to {key}", len(asked), len(made))
        for answer in _made(asked, how, model, precision, longest, run, len(made), quant):
            lines.add({"ids": answer})
            made.append(answer)
            run.console.step(f"answers to {key}", len(made), len(asked))
            run.stop.check("while answers are made")
        run.console.end()
    if not any(made):
        raise DataError(
            "the model answers none of the prompts",
            fix="use answers: given",
            key=f"{place}.answers" if place else "answers",
        )
    return answered(asked, made)


def _kept(
    lines: Lines, asked: Prepared, how: Made, model: ModelRef, precision: str, longest: int, quant: Quant | None
) -> list[list[int]]:
    """The answers that are there already; the file is begun anew where they are others' or other prompts'."""
    settings = [resolve(model).sha256, asked.digest, asdict(how.sampling), precision, longest]
    settings += [repr(model.rope)] if model.rope is not None else []
    settings += [asdict(quant)] if quant is not None else []
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return [line["ids"] for line in lines.after({"of": digest})]


def _made(
    asked: Prepared,
    how: Made,
    model: ModelRef,
    precision: str,
    longest: int,
    run: Run,
    done: int,
    quant: Quant | None,
) -> Iterator[list[int]]:
    """The answers of all prompts but the first `done`, in order."""
    loaded, kinds = open_model(model, run.device, precision, run.grants, quant)
    prompts = [tuple(asked.example(at)[0].tolist()) for at in range(done, len(asked))]
    most = min(how.generator.sequences, len(prompts)) * (longest + how.generator.cache.block)
    held = Here(loaded, mixed=kinds.mixed, device=run.device, most=most)
    told = replace(how, sampling=telling(how.sampling, ends(loaded.model, loaded.tokenizer)))
    with closing(how.generator.open(held)) as writer:
        for completion in writer.each(_asks(prompts, told, longest)):
            yield ended(completion.sound())


def _asks(prompts: Sequence[Sequence[int]], how: Made, longest: int) -> Iterator[Ask]:
    for ids in prompts:
        most = min(how.sampling.max_tokens, longest - len(ids))
        least = min(how.sampling.min_tokens, most)
        yield Ask(Prompt(tuple(ids)), replace(how.sampling, max_tokens=most, min_tokens=least, n=1))
