"""The hidden states of chosen layers, on the way of a forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.types import Packed, Segment
from llmkit.models.heads import causal_of
from llmkit.models.layers import layers


def tapped(model: Any, tokens: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Of one text (L,) the hidden states of `taps` (`HeadShape.taps`), (L, H) each, without gradients."""
    causal = causal_of(model)
    every = layers(causal.base_model)
    found: dict[int, Tensor] = {}
    hooks = [every[tap - 1].register_forward_hook(partial(_keep, found, tap)) for tap in taps if tap < len(every)]
    length, device = len(tokens), tokens.device
    try:
        with torch.no_grad():
            attend, positions = Packed((Segment(0, 0, length),)), torch.arange(length, device=device)[None]
            out = causal.base_model(input_ids=tokens[None], position_ids=positions, use_cache=False, attend=attend)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[tap] if tap < len(every) else out.last_hidden_state[0] for tap in taps]


def _keep(found: dict[int, Tensor], tap: int, _: nn.Module, __: Any, out: Any) -> None:
    found[tap] = (out[0] if isinstance(out, tuple) else out)[0].detach()
