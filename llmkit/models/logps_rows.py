"""Log-probabilities under a frozen head of which a few rows are trained (peft's trainable tokens).

The hidden states take the frozen head's way over the head with its rows in place. What the rows learn needs the chances
of their tokens alone: `d logp_n / d row_i = ([label_n = i] - p_n(i)) hidden_n`, and the softmax's sum is known from the
label's own logit. So it costs two products of (N, H, rows) beside.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmkit.models.logits import Shape
from llmkit.models.logps import chosen_logps


class Rows(NamedTuple):
    """Trained rows (k, H) of a head's weight (V, H), and their places (k,)."""

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    places: Tensor


def trained_rows(head: nn.Module) -> Rows | None:
    """The rows of a head that peft trains; None where it is another head, or trains more."""
    adapter: Any = getattr(head, "token_adapter", None)
    if adapter is None or adapter.disable_adapters or adapter.merged or len(adapter.active_adapters) != 1:
        return None
    base, name = adapter.get_base_layer(), adapter.active_adapters[0]
    bias = getattr(base, "bias", None)
    if type(base) is not nn.Linear or base.weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    places = torch.tensor(adapter.token_indices[name], device=base.weight.device)
    return Rows(base.weight, bias, adapter.trainable_tokens_delta[name], places)


def row_logps(hidden: Tensor, head: Rows, labels: Tensor, shape: Shape = Shape()) -> Tensor:
    """Log-probabilities of `labels` (N,) after `hidden` (N, H): (N,), fp32."""
    with torch.no_grad():
        whole = head.weight.index_copy(0, head.places, head.rows.to(head.weight))
    logps = chosen_logps(hidden, whole, head.bias, labels, None, shape)
    if not torch.is_grad_enabled() or not head.rows.requires_grad:
        return logps
    return cast(
        Tensor, cast(Any, _Rows).apply(logps, head.rows, hidden.detach(), whole, head.bias, head.places, labels, shape)
    )


class _Rows(torch.autograd.Function):
    """Hands the gradient on to what made `logps`, and gives the rows theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        rows: Tensor,
        hidden: Tensor,
        whole: Tensor,
        bias: Tensor | None,
        places: Tensor,
        labels: Tensor,
        shape: Shape,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, shift = hidden.float(), None if bias is None else bias.float()
            own = (hidden * whole[labels].float()).sum(1) + (0.0 if shift is None else shift[labels])
            some = nn.functional.linear(hidden, whole[places].float(), None if shift is None else shift[places])
            total = shape.apply(own) - logps  # the logarithm of the softmax's sum
            final = shape.apply(some)
            step = (labels[:, None] == places).float() - torch.exp(final - total[:, None])
            slope = shape.slope(final)
            ctx.save_for_backward(step if slope is None else step * slope, hidden)
        ctx.scale, ctx.kind = shape.scale, rows.dtype
        return logps.view_as(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step, hidden = ctx.saved_tensors
        to_rows = (step * (grad * ctx.scale)[:, None]).T @ hidden
        return grad, to_rows.to(ctx.kind), None, None, None, None, None, None
