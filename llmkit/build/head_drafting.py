"""A draft head made for a loaded model, and what teaches it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmkit.build.training import Built
from llmkit.core.errors import ModelError, RecipeError
from llmkit.data.prepare import Prepared
from llmkit.models import drafts
from llmkit.models.draft_files import load_head
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.draft_taught import Taught
from llmkit.models.foretold import Rule
from llmkit.models.heads import causal_of
from llmkit.models.load import Loaded
from llmkit.models.memo import Memo

START = "drafter.start"


def taught(built: Built, head: DraftHead, depth: int, rule: Rule, folder: Path, held: str = "") -> Built:
    """The head in the place of what is trained; the model beside it is frozen, what it makes is kept in `folder`.
    `held`: how it is scaled, if it is."""
    built.model.requires_grad_(False)
    head = head.to(next(built.model.parameters()).device)
    config = causal_of(built.model).config.get_text_config()
    wide = len({*head.taps, int(config.num_hidden_layers)}) * head.shape.width
    resolved, dtype = built.loaded.resolved, next(built.model.parameters()).dtype
    said = repr((resolved.sha256, head.taps, dtype)) + held
    memo = Memo(folder / "features", wide, hashlib.sha256(said.encode()).hexdigest())
    scored = Taught(built.model, head, depth, rule, memo)
    return replace(built, scored=scored, trained={f"head.{name}": p for name, p in head.named_parameters()})


def new_head(loaded: Loaded, train: Prepared, words: int, taps: Sequence[int], seed: int) -> DraftHead:
    """A head that begins anew: its output layer is of the model's own rows, the rest is random.

    Raises:
        RecipeError: the model has no such layers.
        ModelError: it has no plain head to begin with.
    """
    causal = causal_of(loaded.model)
    layers, whole = int(causal.config.get_text_config().num_hidden_layers), causal.get_output_embeddings()
    check_taps(taps, layers)
    ids = frequent(train, min(words, len(whole.weight)), len(whole.weight))
    torch.manual_seed(seed)
    head = DraftHead(shape_for(loaded.model, len(ids), taps), causal.get_input_embeddings(), ids)
    if whole.weight.shape[1] != head.shape.width or not whole.weight.is_floating_point():
        what = f"the head of {type(causal).__name__} is over {whole.weight.shape[1]} values, and {head.shape.width} are"
        raise ModelError(f"{what} there", fix="use drafter: {kind: distilled}", key="drafter.kind")
    with torch.no_grad():
        head.out.weight.copy_(whole.weight[ids.to(whole.weight.device)])
        last = head.fuse.weight[:, -head.shape.width :]
        head.fuse.weight.mul_(0.1)
        last.copy_(torch.eye(head.shape.width))  # what the model's own head reads comes through as it is
        for linear in (head.o, head.down):
            nn.init.zeros_(linear.weight)
    return head


def check_taps(taps: Sequence[int], layers: int) -> None:
    """Raises: RecipeError: one is none of a model's `layers`."""
    if wrong := [tap for tap in taps if not 1 <= tap <= layers]:
        what = f"{wrong[0]} is none of the model's {layers} layers"
        raise RecipeError(what, fix=f"give numbers from 1 to {layers}", key="drafter.taps")


def frequent(train: Prepared, count: int, words: int) -> Tensor:
    """The words that are trained most often, in the order of their ids; of those that never are, the first ids, which
    tokenizers give to what is frequent anywhere."""
    ids, weights = np.asarray(train.ids), np.asarray(train.weights)
    often = np.bincount(ids[weights > 0], minlength=words)[:words]
    return torch.from_numpy(np.sort(np.argsort(-often, kind="stable")[:count]).astype(np.int64))


def covered(head: DraftHead, train: Prepared) -> float:
    """The share of what is trained that the draft vocabulary has."""
    ids = np.asarray(train.ids)[np.asarray(train.weights) > 0]
    return float(np.isin(ids, head.ids.cpu().numpy()).mean()) if len(ids) else 0.0


def older_head(start: str, loaded: Loaded) -> DraftHead:
    """The head that a run left, or whose folder this is, for a model of the same tokens: whose weights have changed.

    Raises:
        ModelError: there is none, or it is of other sizes or tokens.
    """
    folder = drafts.folder_of(start, START)
    if drafts.read(folder, "head", START).target.vocabulary != drafts.vocabulary(loaded.tokenizer):
        what = f"{start} was made for a model of other tokens"
        raise ModelError(what, fix="leave drafter.start out", key=START)
    causal: Any = causal_of(loaded.model)
    head = load_head(folder, causal.get_input_embeddings(), START)
    here = shape_for(loaded.model, head.shape.words, head.taps)
    if here.width != head.shape.width or max(head.taps) > int(causal.config.get_text_config().num_hidden_layers):
        what = f"{start} reads hidden states {head.shape.width} wide of layers {head.taps}, which this model has not"
        raise ModelError(what, fix="leave drafter.start out", key=START)
    return head
