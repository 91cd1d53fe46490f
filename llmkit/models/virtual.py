"""Adapters of peft that put virtual tokens or a prefix before every row, under our head.

peft's own forward does it on the way to all logits; here the decoder is called as it calls it, and the hidden states of
the rows' own tokens come back in their places.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from llmkit.core.types import Batch
from llmkit.models.probe import Support


def virtual_tokens(model: Any) -> int:
    """How many stand before each row; 0 with other adapters, and without one."""
    if not hasattr(model, "peft_config") or not model.active_peft_config.is_prompt_learning:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


def supported(support: Support, model: Any) -> Support:
    """What a model supports with its adapter: virtual tokens stand before whole rows, and know no context."""
    if not virtual_tokens(model):
        return support
    kind = model.active_peft_config.peft_type.value.lower()
    return Support(False, False, False, f"{kind} puts its virtual tokens once before a row")


def hidden(model: Any, decoder: Any, batch: Batch) -> Tensor:
    """The last hidden states of a batch's own tokens, (B, T, H), after the virtual ones."""
    if batch.attend is not None and not batch.lengths:
        raise ValueError("virtual tokens stand once before a row: give batches that are not packed")
    count, (rows, width) = virtual_tokens(model), batch.tokens.shape
    ends = torch.tensor(batch.lengths, device=batch.tokens.device)[:, None]
    mask = torch.arange(count + width, device=ends.device)[None] < ends + count
    before = torch.arange(count, device=ends.device).expand(rows, count)
    after = batch.positions + count
    made = model.get_prompt(rows)
    if not isinstance(made, Tensor):  # a cache of keys and values
        out = decoder(
            input_ids=batch.tokens, position_ids=after, attention_mask=mask, past_key_values=made, use_cache=False
        )
        return cast(Tensor, out.last_hidden_state)
    own = decoder.get_input_embeddings()(batch.tokens)
    embeds = torch.cat([made.to(own.dtype), own], 1)
    places = torch.cat([before, after], 1)
    out = decoder(inputs_embeds=embeds, position_ids=places, attention_mask=mask, use_cache=False)
    return cast(Tensor, out.last_hidden_state[:, count:])
