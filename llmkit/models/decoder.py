"""A loaded model as the inference engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from llmkit.core.errors import ModelError
from llmkit.core.types import Paged
from llmkit.models.heads import shape_of


class Decoder:
    """Last hidden states over a paged cache, and the head."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self.shape = shape_of(self.causal.config.get_text_config())

    @property
    def device(self) -> torch.device:
        """Of the embeddings."""
        return cast(torch.device, self.causal.get_input_embeddings().weight.device)

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Paged, adapters: Sequence[str]) -> Tensor:
        """Last hidden states (N, H) of tokens (N,) at positions (N,)."""
        if wrong := [name for name in adapters if name]:
            raise ModelError(f"no adapter is named {wrong[0]}", fix="load it first", key="adapter")
        out = self.causal.base_model(
            input_ids=tokens[None], position_ids=positions[None], attend=attend, use_cache=False
        )
        return cast(Tensor, out.last_hidden_state[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R, V), with the family's scale and soft-cap, in fp32."""
        return self.shape.apply(self.causal.get_output_embeddings()(hidden).float())
