"""Model -> adapter -> head -> stepper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llmkit.adapters.method import Around
from llmkit.adapters.node import Adapter
from llmkit.build.precision import Types
from llmkit.core.errors import ModelError
from llmkit.models.heads import Scored, check_head
from llmkit.models.load import DTYPES, How, Loaded, load
from llmkit.models.node import ModelRef, Quant
from llmkit.models.resolve import Resolved
from llmkit.models.stored import Stored
from llmkit.models.virtual import supported
from llmkit.models.wrappers import towers
from llmkit.parallel.offload import Offload, Pinned
from llmkit.parallel.optimizers import Optimizers
from llmkit.parallel.scaler import Scaler
from llmkit.parallel.single import Single, Ways


@dataclass(frozen=True)
class Built:
    """All that a stage needs of a model in training."""

    loaded: Loaded
    model: nn.Module
    """With its adapter."""
    scored: Scored
    trained: dict[str, nn.Parameter]


def build(
    resolved: Resolved,
    ref: ModelRef,
    how: How,
    adapter: Adapter,
    recompute: int,
    seed: int,
    notice: Callable[[str], None] = lambda _: None,
) -> Built:
    """A model ready to be trained; every `recompute`-th layer makes its activations again, none at 0.

    Raises:
        ModelError: it cannot be loaded, or the adapter does not fit it.
    """
    if resolved.base is not None:
        raise ModelError(
            f"{ref.name} is an adapter; training goes on from a whole model", fix="merge it first", key="model"
        )
    loaded = load(resolved, ref, how)
    check_head(Scored(loaded.model))
    torch.manual_seed(seed)  # adapters begin at random
    around = Around(towers(loaded.model), loaded.tokenizer, loaded.added, Stored(resolved.folder), notice)
    model = adapter.attach(loaded.model, around)
    loaded = replace(loaded, support=supported(loaded.support, model))
    if recompute:
        base = loaded.model
        base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=int(recompute))
        model.train()
    scored = Scored(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError("nothing is trained", fix="give adapter.targets that match", key="adapter")
    return Built(loaded, model, scored, trained)


def stepper(
    built: Built, optimizer: Optimizers, types: Types, in_backward: bool = False, offload: bool = False
) -> Single:
    """One process on one device; `in_backward` and `offload` are the levers of `memory`."""
    ways = Ways(
        DTYPES[types.short] if types.mixed else None,
        Scaler() if types.compute == "fp16" else None,
        in_backward,
        Offload(built.model.parameters(), Pinned()) if offload else None,
    )
    return Single(built.scored, built.trained, optimizer, ways)


def how(device: str, types: Types, quant: Quant, adapter: Adapter, code: bool, nonfinite: bool) -> How:
    """How a stage's model is held: a frozen base under autocast is held in 16 bits already."""
    held: Any = types.short if types.mixed and adapter.frozen_base and device == "cuda" else types.params
    return How(device, held, types.half, quant, code, nonfinite, types.short)
