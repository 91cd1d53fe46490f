"""Training weights of the model itself: all of them, or those that globs choose."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmkit.adapters.method import Around
from llmkit.adapters.names import found
from llmkit.adapters.node import NoAdapter
from llmkit.core.errors import ModelError


def choose(model: Any, node: NoAdapter, around: Around) -> nn.Module:
    """Switches gradients on where they are wanted.

    Raises:
        ModelError: a glob matches nothing, or nothing is left to train.
    """
    params = dict(model.named_parameters())
    trained = set(params) if not node.train else set()
    for key, globs in (("train", node.train), ("freeze", node.freeze)):
        for glob in globs:
            held = found(glob, params, f"adapter.{key}")
            around.notice(f"adapter.{key} {glob}: {len(held)} of {len(params)} tensors")
            trained = trained | set(held) if key == "train" else trained - set(held)
    if not trained:
        raise ModelError("nothing is left to train", fix="freeze less", key="adapter.freeze")
    for name, parameter in params.items():
        parameter.requires_grad_(name in trained)
    for name in around.idle:
        model.get_submodule(name).requires_grad_(False)
    tuned: nn.Module = model
    return tuned
