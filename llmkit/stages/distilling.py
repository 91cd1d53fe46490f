"""A student in its stage: put beside its teacher before the loop, or beside what was kept of the teacher's laws."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.build.opening import load
from llmkit.build.precision import types
from llmkit.build.training import Built, check, headed
from llmkit.core.errors import ModelError, told_below
from llmkit.core.run import Grants, Run
from llmkit.core.shape import Shape
from llmkit.core.types import Batch
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit, NoPacking, Packing
from llmkit.data.prepare import Prepared
from llmkit.losses.distil import Divergence, coarse, mixture
from llmkit.models.distilled import ROWS, Compare, Distilled, Say
from llmkit.models.heads import Scored
from llmkit.models.kept_laws import KeptLaws, likeliest
from llmkit.models.load import DTYPES, How, Loaded
from llmkit.models.logits import slices
from llmkit.models.outline import stored
from llmkit.models.resolve import resolve, resolve_at
from llmkit.models.teacher import Teacher
from llmkit.models.tokenizer import read_tokenizer
from llmkit.models.words import other_words
from llmkit.stages.distill import Cached, Distill

AT_ONCE = 64
"""Examples that are laid out together where laws are kept."""
BLOCKS = 6
"""Of logits, that a step holds at once: the student's, the teacher's, and what is made of them."""


def check_words(node: Distill, run: Run) -> None:
    """Sees to it that the teacher has the student's tokens, before either is loaded.

    Raises:
        ModelError: it has others.
    """
    resolved = resolve_at(node.teacher, "teacher")
    own = read_tokenizer(resolve(node.model), node.model, run.grants.code)
    why = other_words(own, read_tokenizer(resolved, node.teacher, run.grants.code))
    if why:
        raise _strange(node, why)


def _strange(node: Distill, why: str) -> ModelError:
    what = f"{node.teacher.name} has another tokenizer: {why}"
    return ModelError(what, fix=f"name a teacher with the tokenizer of {node.model.name}", key="teacher")


def beside(node: Distill, shape: Shape) -> int:
    """Numbers of 4 bytes that are there beside the models: blocks of logits."""
    return BLOCKS * ROWS["cpu"] * shape.vocab if node.asked else 0


def _loaded(node: Distill, device: str, grants: Grants) -> Loaded:
    kinds, resolved = types(node.types_name, device), resolve_at(node.teacher, "teacher")
    held: Any = kinds.short if kinds.mixed and device == "cuda" else kinds.params
    quant = node.teacher_quant or resolved.quant
    with told_below("teacher", "model"):
        return load(resolved, node.teacher, How(device, held, kinds.half, quant, grants.code, short=kinds.short))


def _scored(loaded: Loaded) -> Scored:
    scored = headed(loaded, loaded.model)
    if not isinstance(scored, Scored):
        what = f"{loaded.resolved.name} is a classifier, and says no words"
        raise ModelError(what, fix="name a language model", key="teacher")
    check(scored)
    return scored


def around(node: Distill, built: Built, folder: Path) -> Built:
    """The student beside its teacher, in the place of what is scored.

    Raises:
        ModelError: the teacher cannot be loaded, has other tokens, or takes no packed rows where there are any.
    """
    own, divergence = len(built.scored.causal[0].get_output_embeddings().weight), node.loss.divergence
    if node.cached is not None:
        say: Say = partial(_say_kept, _kept(node, node.cached, folder), divergence)
        words = _words(node)
    else:
        loaded = _loaded(node, next(built.model.parameters()).device.type, Grants())
        if why := other_words(built.loaded.tokenizer, loaded.tokenizer):
            raise _strange(node, why)
        if built.loaded.support.packed and not loaded.support.packed and isinstance(node.data.packing, FirstFit):
            raise ModelError(loaded.support.reason, fix="set data.packing=none", key="teacher")
        teacher = Teacher(_scored(loaded))
        words = min(own, teacher.size)
        say = partial(_say, teacher, divergence, node.temperature, words)
    mixed = partial(mixture, temperature=node.temperature, share=node.cross_entropy)
    return replace(built, scored=Distilled(built.model, say, mixed, words))


def _say(
    teacher: Teacher, divergence: Divergence, temperature: float, words: int, batch: Batch, chosen: tuple[Tensor, ...]
) -> Callable[[slice], Compare]:
    """What a teacher that is here says."""
    said = teacher.logits(batch, chosen)

    def told(here: slice) -> Compare:
        return lambda scaled: divergence(scaled, torch.log_softmax(said(here)[:, :words] / temperature, 1))

    return told


def _say_kept(
    laws: KeptLaws, divergence: Divergence, batch: Batch, chosen: tuple[Tensor, ...]
) -> Callable[[slice], Compare]:
    """What was kept of it."""
    found = laws.of(batch)

    def told(here: slice) -> Compare:
        ids, law = found(here)
        return lambda scaled: coarse(scaled, ids, law, divergence)

    return told


def keep(node: Distill, how: Cached, prepared: Prepared, run: Run, key: str) -> None:
    """Asks the teacher for its laws of all examples, but for those that it was asked for already.

    Raises:
        ModelError: the teacher cannot be loaded.
        ResourceError: the disk refuses.
    """
    laws, shown = _kept(node, how, run.scratch), f"what the teacher says of {key}"
    asked: tuple[Teacher, bool] | None = None
    run.console.start(shown, len(prepared))
    for ids in slices(len(prepared), AT_ONCE):
        some = range(ids.start, ids.stop)
        if any(map(laws.lacks, _batches(node, prepared, some, True, run.device))):
            asked = asked or _teacher(node, run.device, run.grants)
            teacher, packed = asked
            _ask(node, laws, teacher, _batches(node, prepared, some, packed, run.device), run.device)
        run.console.step(shown, ids.stop, len(prepared))
        run.stop.check("while the teacher is asked")
    run.console.end()


def _teacher(node: Distill, device: str, grants: Grants) -> tuple[Teacher, bool]:
    """And whether it takes packed rows."""
    loaded = _loaded(node, device, grants)
    return Teacher(_scored(loaded)), loaded.support.packed


def _batches(node: Distill, prepared: Prepared, ids: range, packed: bool, device: str) -> list[Batch]:
    packing: Packing = FirstFit() if packed else NoPacking()
    return micro_batches(prepared, ids, packing, node.data.max_length, 1, packed, device)


def _ask(node: Distill, laws: KeptLaws, teacher: Teacher, batches: Sequence[Batch], device: str) -> None:
    """Of each batch whose texts are not all there."""
    kinds, words = types(node.types_name, device), _words(node)
    for batch in filter(laws.lacks, batches):
        chosen = (batch.weights != 0).nonzero(as_tuple=True)
        with torch.no_grad(), torch.autocast(device, DTYPES[kinds.short], enabled=kinds.mixed):
            said = teacher.logits(batch, chosen)
            blocks = slices(len(chosen[0]), ROWS[device])
            made = [likeliest(said(here)[:, :words], laws.top_k, node.temperature) for here in blocks]
        ids, law = (torch.cat(column) for column in zip(*made, strict=True))
        laws.put(batch, ids, law)


def _words(node: Distill) -> int:
    """Rows of the vocabulary that both models have."""
    resolved = resolve_at(node.teacher, "teacher")
    return min(stored(resolve(node.model).folder).vocab, stored((resolved.base or resolved).folder).vocab)


def _kept(node: Distill, how: Cached, folder: Path) -> KeptLaws:
    settings = [resolve_at(node.teacher, "teacher").sha256, node.temperature, node.types_name, node.teacher.rope]
    settings += [asdict(node.teacher_quant) if node.teacher_quant is not None else None]
    of = hashlib.sha256(repr(settings).encode()).hexdigest()
    return KeptLaws(folder / "teacher", how.top_k, _words(node), of)
