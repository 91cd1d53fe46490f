"""A loaded model as the inference engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from llmkit.core.types import Paged
from llmkit.models.adapter_files import Base
from llmkit.models.heads import causal_of, shape_of
from llmkit.models.loras import Bank, Narrow, base_of
from llmkit.models.ordered import elementwise
from llmkit.models.serving import attends_in_order, lacks_order, serving


class Decoder:
    """Last hidden states over a paged cache, and the head."""

    def __init__(self, model: Any, base: Base | None = None, narrow: Narrow | None = None, exact: bool = False) -> None:
        """`base`: what adapters are checked against, where the model itself does not tell it; `narrow`: what of them
        lies here.

        Raises:
            ModelError: it cannot be run exactly, though `exact` asks for it.
        """
        self.model = model = serving(model, exact)
        self.causal = causal_of(model)
        self.exact = not lacks_order(model, exact)
        """Whether a row does not depend on those beside it."""
        self.shape = shape_of(self.causal.config.get_text_config())
        self.bank = Bank(self.causal, base or base_of(self.causal), narrow, self.exact)
        """Adapters over it, that requests name."""

    @property
    def device(self) -> torch.device:
        """Of the embeddings; the host's, where they wait elsewhere until they are called."""
        held = cast(torch.device, self.causal.get_input_embeddings().weight.device)
        return torch.device("cpu") if held.type == "meta" else held

    @property
    def trees(self) -> bool:
        """Whether a tree of drafts costs no more than as many tokens of a chain: elsewhere its tokens are attended to
        one by one."""
        return attends_in_order(self.causal)

    @property
    def words(self) -> int:
        """Rows of the vocabulary, wherever they lie."""
        return self.bank.base.words

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Paged, adapters: Sequence[str]) -> Tensor:
        """Last hidden states (N, H) of tokens (N,) at positions (N,); `adapters` has the key of that of each span."""
        given = self.bank.given(tokens, attend, adapters)
        with self.bank.over(attend, adapters):
            out = self.causal.base_model(**given, position_ids=positions[None], attend=attend, use_cache=False)
        return cast(Tensor, out.last_hidden_state[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, H) -> (R, V), with the family's scale and soft-cap, in fp32."""
        return elementwise(self.shape.apply, self.causal.get_output_embeddings()(hidden).float())
