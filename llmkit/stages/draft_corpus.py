"""Puts a corpus for look-ups together: its texts, its files, and how often it is right on others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from llmkit.checkpoint.identity import packages
from llmkit.core.artifact import Artifact, publish
from llmkit.core.files import published
from llmkit.core.run import Run
from llmkit.core.types import Report
from llmkit.data.node import Readable
from llmkit.data.order import spread
from llmkit.data.prepare import Prepared, template_digest
from llmkit.inference.speculation.corpus import DEEP, Corpus, indexed, save
from llmkit.models import drafts
from llmkit.models.outline import stored
from llmkit.models.resolve import resolve
from llmkit.models.tokenizer import read_tokenizer
from llmkit.stages.draft import Draft
from llmkit.stages.draft_ngram import NgramCorpus
from llmkit.stages.quarantine import Quarantine
from llmkit.stages.report import write_report, write_reports
from llmkit.stats.bootstrap import ratio

DRAFTS, ROWS = 8, 256
"""Of a step in the measurement, and the rows of `data.valid` that it takes."""


def make(stage: Draft, node: NgramCorpus, run: Run) -> Artifact:
    """Reads the texts, lays them in order, measures them on `data.valid`, and leaves all in the run's folder.

    Raises:
        DataError: there is no text.
        ModelError: there is no such model.
    """
    torch.set_num_threads(run.threads)
    resolved = resolve(stage.model)
    tokenizer = read_tokenizer(resolved, stage.model, run.grants.code)
    with run.stop.at_once("while texts are read"):
        texts = _texts(stage, run, tokenizer, "data.train", stage.data.sources("train"))
        held = stage.data.sources("valid")
        valid = _texts(stage, run, tokenizer, "data.valid", held) if held else None
    with run.stop.at_once("while the corpus is put in order"):
        base = resolved.base or resolved
        words = max(stored(base.folder).vocab, max(tokenizer.get_vocab().values()) + 1)
        made = indexed((texts.example(at)[0] for at in range(len(texts))), words)
        corpus = Corpus(*made)
        reports = _measured(corpus, valid, stage.seed) if valid is not None else []
    size = corpus.count * (corpus.width + 4)
    settings = asdict(node) | {"words": words, "tokens": corpus.count, "bytes": size}
    with published(run.folder / "model") as folder:
        save(folder, *made)
        drafts.write(folder, node.kind, settings, drafts.identity(resolved, tokenizer))
    run.console.notice(f"{corpus.count:,} tokens of {len(texts)} texts, {size / 2**20:.1f} MiB")
    write_reports(run, reports)
    write_report(run.folder)
    return publish(
        run.folder,
        {
            "kind": stage.kind,
            "base": resolved.facts(),
            "recipe_digest": run.recipe_digest,
            "recipe": run.values,
            "data": {"train": texts.digest, "valid": valid.digest if valid is not None else ""},
            "data_files": texts.files,
            "counts": texts.counts,
            "template": template_digest(tokenizer),
            "packages": packages(),
            "seed": stage.seed,
            "samples": len(texts),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        },
    )


def _texts(stage: Draft, run: Run, tokenizer: Any, key: str, sources: Sequence[Readable]) -> Prepared:
    """The texts of `data.train` or `data.valid`, with the model's own answers where those are asked for."""
    aside = Quarantine(run.scratch / f"quarantine.{key}.jsonl")
    made = stage.answered(stage.examples(sources, tokenizer, key, aside), run, key)
    aside.tell(run.console)
    return made


def _measured(corpus: Corpus, valid: Prepared, seed: int) -> list[Report]:
    """Tokens a step, the one that the model makes itself among them, where the answers of `valid` are drafted from the
    corpus alone."""
    tokens, steps, clusters = [], [], []
    for at in spread(len(valid), ROWS):
        ids, weights = valid.example(at)
        text, first = ids.tolist(), int(np.argmax(np.asarray(weights) > 0))
        tokens.append(float(len(text) - first))
        steps.append(float(_steps(corpus, text, first)))
        clusters.append(valid.rows[at].cluster)
    return [ratio("tokens_per_step", tokens, steps, clusters, seed=seed)]


def _steps(corpus: Corpus, text: list[int], at: int) -> int:
    """Steps that make `text` from its place `at` on."""
    steps = 0
    while at < len(text):
        drafted = corpus.follows(text[max(0, at - DEEP) : at], DRAFTS).tokens
        right = next((n for n, (a, b) in enumerate(zip(drafted, text[at:], strict=False)) if a != b), len(drafted))
        at, steps = at + right + 1, steps + 1
    return steps
