"""A head in its stage: put beside its model before the loop, and left in a folder of its own after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmkit.build.head_drafting import covered, new_head, older_head, taught
from llmkit.build.training import Built
from llmkit.data.prepare import Prepared
from llmkit.models.draft_files import save_head
from llmkit.models.draft_fitted import fit
from llmkit.models.draft_taught import Taught
from llmkit.models.drafts import identity
from llmkit.stages.draft import Draft
from llmkit.stages.draft_head import HeadDrafter


def around(node: HeadDrafter, built: Built, train: Prepared, folder: Path, stage: Draft) -> Built:
    """The head in the place of what is trained."""
    loaded, rope = built.loaded, stage.model.rope
    fresh = new_head(loaded, train, node.vocabulary, node.taps, stage.seed) if node.start is None else None
    head = fresh or older_head(node.start or "", loaded)
    made = taught(built, head, node.depth, node.loss.rule, folder, "" if rope is None else repr(rope))
    if fresh is not None:
        fit(_taught(made), texts(train, head.ids.device))
    share = covered(head, train)
    logging.getLogger("llmkit").info("%d words, %.2f %% of what is learned", head.shape.words, 100 * share)
    return made


def texts(train: Prepared, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and weights of each text that is learned."""
    for at in range(len(train)):
        tokens, weights = (torch.from_numpy(part.copy()).to(device) for part in train.example(at))
        yield tokens.long(), weights


def leave(built: Built, folder: Path) -> None:
    """The head in its folder; what the model made for it is gone."""
    scored = _taught(built)
    save_head(scored.head, folder, identity(built.loaded.resolved, built.loaded.tokenizer))
    scored.memo.remove()


def _taught(built: Built) -> Taught:
    if not isinstance(built.scored, Taught):
        raise TypeError("no head is trained here")
    return built.scored
