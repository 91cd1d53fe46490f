"""The head: a causal language model that gives log-probabilities of chosen tokens (`logps.py`), never all logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.core.errors import ModelError
from llmkit.core.types import Batch
from llmkit.models.attend import NO_MASK
from llmkit.models.logits import Shape
from llmkit.models.logps import BLOCK, chosen_logps
from llmkit.models.logps_rows import row_logps, trained_rows
from llmkit.models.virtual import hidden, virtual_tokens

ROWS = 64
"""Positions whose whole logits are held at a time."""


def shape_of(config: Any) -> Shape:
    """The family's scale and soft-cap, by the names that transformers' configurations give them."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(
        getattr(config, "lm_head_multiplier", None) or 1.0
    )
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Shape(scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))


class Scored(nn.Module):
    """A causal language model and its head as one module: all that reads weights happens inside `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        causal: Any = cast(Any, model).get_base_model() if hasattr(model, "peft_config") else model
        self.causal: Any = [causal]  # in a list: the same modules must not be registered twice
        self.shape = shape_of(causal.config.get_text_config())

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, (B, T, H)."""
        if virtual_tokens(self.model):
            return hidden(self.model, self.causal[0].base_model, batch)
        context: dict[str, Any] = {"attend": batch.attend, "attention_mask": NO_MASK.to(batch.tokens.device)}
        if batch.attend is None:
            ends = torch.tensor(batch.lengths, device=batch.tokens.device)
            context = {"attention_mask": torch.arange(batch.tokens.shape[1], device=ends.device)[None] < ends[:, None]}
        decoder = self.causal[0].base_model
        out = decoder(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, **context)
        return cast(Tensor, out.last_hidden_state)

    def forward(self, batch: Batch) -> Tensor:
        """Log-probabilities of `batch.labels` where `batch.weights` is not 0, row by row: (N,), fp32."""
        hidden = self.hidden(batch)
        chosen = batch.weights != 0
        return self.logps(hidden[chosen], batch.labels[chosen], batch.weights[chosen])

    def likeliest(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the likeliest token at each of those places: (N,), (N,)."""
        hidden = self.hidden(batch)
        chosen = batch.weights != 0
        head = self.causal[0].get_output_embeddings()
        rows = hidden[chosen]
        best = [self.shape.apply(head(part).float()).argmax(1) for part in rows.split(ROWS)]
        return self.logps(rows, batch.labels[chosen]), torch.cat(best)

    def logps(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Log-probabilities of `labels` (N,) after hidden states (N, H); `weights` as in `chosen_logps`."""
        head = self.causal[0].get_output_embeddings()
        if type(head) is nn.Linear:
            return chosen_logps(hidden, head.weight, head.bias, labels, weights, self.shape)
        if (some := trained_rows(head)) is not None:
            return row_logps(hidden, some, labels, self.shape)
        positions, words = BLOCK[hidden.device.type]
        rows = max(16, positions * words // head.weight.shape[0])
        parts = [self._wrapped(head, h, y) for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    def _wrapped(self, head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        """One chunk through a head that is more than a linear (an adapter sits on it), recomputed in the backward."""

        def run(h: Tensor) -> Tensor:
            return torch.log_softmax(self.shape.apply(head(h).float()), 1).gather(1, labels[:, None])[:, 0]

        return cast(Tensor, checkpoint(run, hidden, use_reentrant=False))


def check_head(scored: Scored) -> None:
    """Compares the head with the model's own logits on a few tokens.

    Raises:
        ModelError: the family does something to its logits that llmkit does not know.
    """
    causal = scored.causal[0]
    size = causal.get_output_embeddings().weight.shape[0]
    device = causal.get_output_embeddings().weight.device
    tokens = torch.arange(1, 7, device=device)[None] % size
    training = scored.training
    scored.eval()
    with torch.no_grad():
        own = torch.log_softmax(causal(input_ids=tokens, use_cache=False).logits.float(), -1)[0]
        hidden = causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        ours = scored.logps(hidden, tokens[0])
    scored.train(training)
    picked = own.gather(1, tokens[0][:, None])[:, 0]
    close = 1e-4 if hidden.dtype == torch.float32 else 5e-2
    if not torch.allclose(ours, picked, rtol=close, atol=close):
        raise ModelError(
            f"{type(causal).__name__} does something to its logits that the head does not know "
            f"(off by {(ours - picked).abs().max():.2g})",
            fix="use a family of the support table (docs/support.md)",
            key="model",
        )
