"""A small model in its stage: put beside its teacher before the loop, and left with its `draft.json` after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmkit.build.drafting import SHORT
from llmkit.build.opening import load
from llmkit.build.student import student_of
from llmkit.build.training import Built, headed
from llmkit.core.errors import ModelError
from llmkit.core.files import published
from llmkit.models import drafts
from llmkit.models.draft_student import Student
from llmkit.models.heads import Scored
from llmkit.models.load import How, Loaded
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.models.words import other_words
from llmkit.stages.draft_distilled import Distilled


def around(node: Distilled, built: Built, seed: int) -> Built:
    """The small model in the place of what is trained; the model is its teacher.

    Raises:
        ModelError: the one that it starts from has other tokens, or cannot be loaded.
    """
    teacher = headed(built.loaded, built.loaded.model)
    if not isinstance(teacher, Scored):
        raise TypeError("a classifier teaches no words")
    model = student_of(built.loaded, node.layers, node.width, seed) if node.start is None else _older(node.start, built)
    model.requires_grad_(True)
    scored = Student(model, teacher, node.loss.rule)
    return replace(built, model=model, scored=scored, trained=dict(model.named_parameters()))


def leave(node: Distilled, built: Built, folder: Path, write: Callable[[Path], None]) -> None:
    """A Hugging Face folder that knows whom it drafts for."""
    loaded: Loaded = built.loaded
    target = drafts.identity(loaded.resolved, loaded.tokenizer)
    with published(folder) as aside:
        write(aside)
        drafts.write(aside, node.kind, asdict(node), target)


def _older(start: ModelRef, built: Built) -> Any:
    """The small model that there is."""
    weight = next(built.loaded.model.parameters())
    how = How(device=weight.device.type, dtype=SHORT.get(weight.dtype, "fp32"))
    resolved = resolve(start)
    if resolved.base is not None:
        what = f"{start.name} is an adapter, and training goes on from a whole model"
        raise ModelError(what, fix="merge it first", key="drafter.start")
    loaded = load(resolved, start, how)
    if why := other_words(built.loaded.tokenizer, loaded.tokenizer):
        what = f"{start.name} has another vocabulary: {why}"
        raise ModelError(what, fix="name a model of the same tokenizer", key="drafter.start")
    if not loaded.support.packed:
        raise ModelError(loaded.support.reason, fix="name another model", key="drafter.start")
    return loaded.model
