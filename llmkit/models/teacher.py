"""What a frozen model says after chosen places of a batch, block by block: whoever learns of it holds no more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch
from llmkit.models.foretold import Law
from llmkit.models.heads import Scored


class Teacher:
    """A model that others learn from: frozen, and no part of what is trained."""

    def __init__(self, scored: Scored) -> None:
        self.scored = scored.eval().requires_grad_(False)

    @property
    def size(self) -> int:
        """Rows of its vocabulary."""
        return len(self.scored.causal[0].get_output_embeddings().weight)

    def logits(self, batch: Batch, chosen: tuple[Tensor, ...]) -> Law:
        """A slice of the chosen rows -> its logits after them, (n, V), fp32."""
        head = self.scored.causal[0].get_output_embeddings()
        with torch.no_grad():
            hidden = self.scored.hidden(batch)[chosen]
            plain = type(head) is nn.Linear  # under autocast hidden states come in 16 bits
            hidden = hidden if plain else hidden.to(next(head.parameters()).dtype)
            weight = head.weight.to(hidden.dtype) if plain else None
            bias = head.bias.to(hidden.dtype) if plain and head.bias is not None else None

        def logits(here: slice) -> Tensor:
            with torch.no_grad():
                made = head(hidden[here]) if weight is None else nn.functional.linear(hidden[here], weight, bias)
                return self.scored.shape.apply(made.float())

        return logits
