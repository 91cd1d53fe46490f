"""A model in training whose forward draws nothing at random."""

from __future__ import annotations

from typing import Any

from torch import nn

RATES = ("attention_dropout", "dropout", "hidden_dropout", "activation_dropout", "resid_pdrop", "attn_pdrop")
"""What transformers' modules call the rates that their forwards read."""


def quiet(model: nn.Module) -> None:
    """Sets every dropout of this model to 0: a policy is to be the same in each forward."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        held: Any = vars(module)
        for name in (name for name in RATES if isinstance(held.get(name), float)):
            setattr(module, name, 0.0)
