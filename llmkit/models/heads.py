"""The head: log-probabilities of chosen tokens without the logits of all positions.

N positions are chosen (those with weight), V is the vocabulary, H the hidden size. Only (chunk, V) logits exist at a
time. Because the log-probability of a token depends on its own hidden state alone, its gradient
`d logp_n / d hidden_n = W[label_n] - softmax_n W` is made while the chunk's logits are at hand: the head costs two
products of (N, H, V) with a frozen weight and three with a trained one, and the backward pass multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.core.errors import ModelError
from llmkit.core.matmul import linear, through
from llmkit.core.types import Batch
from llmkit.models.attend import NO_MASK

CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 256 << 20}
"""Size of one chunk of fp32 logits: smaller ones read the head's weight more often than they compute."""


@dataclass(frozen=True)
class Shape:
    """What a family does to its logits after the product: `cap * tanh(scale * z / cap)`; cap 0 is none."""

    scale: float = 1.0
    cap: float = 0.0

    def apply(self, logits: Tensor) -> Tensor:
        """The final logits."""
        scaled = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(scaled / self.cap) * self.cap if self.cap else scaled


def shape_of(config: Any) -> Shape:
    """The family's scale and soft-cap, by the names that transformers' configurations give them."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(
        getattr(config, "lm_head_multiplier", None) or 1.0
    )
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Shape(scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))


class Scored(nn.Module):
    """A causal language model and its head as one module: all that reads weights happens inside `forward`."""

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        super().__init__()
        self.model = model
        causal: Any = cast(Any, model).get_base_model() if hasattr(model, "peft_config") else model
        self.causal: Any = [causal]  # in a list: the same modules must not be registered twice
        self.shape = shape_of(causal.config.get_text_config())
        self.chunk = chunk

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, (B, T, H)."""
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

    def logps(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Log-probabilities of `labels` (N,) after hidden states (N, H); `weights` as in `chosen_logps`."""
        head = self.causal[0].get_output_embeddings()
        rows = self.chunk or max(16, CHUNK_BYTES[hidden.device.type] // (4 * head.weight.shape[0]))
        if type(head) is nn.Linear:
            return chosen_logps(hidden, head.weight, head.bias, labels, weights, self.shape, rows)
        parts = [self._wrapped(head, h, y) for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    def _wrapped(self, head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        """One chunk through a head that is more than a linear (an adapter sits on it), recomputed in the backward."""

        def run(h: Tensor) -> Tensor:
            return torch.log_softmax(self.shape.apply(head(h).float()), 1).gather(1, labels[:, None])[:, 0]

        return cast(Tensor, checkpoint(run, hidden, use_reentrant=False))


def plain_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shape: Shape) -> Tensor:
    """The twin that defines `chosen_logps`: dense logits, log-softmax, pick."""
    logits = shape.apply(nn.functional.linear(hidden, weight, bias).float())
    return torch.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]


def chosen_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = None,
    shape: Shape = Shape(),
    chunk: int = 256,
) -> Tensor:
    """Log-probabilities of `labels` (N,) under the head `weight` (V, H), in chunks: (N,), fp32.

    `weights` (N,) says what the loss will multiply each log-probability with, up to one common factor. Then a trained
    head's gradient is made in the forward pass too; a backward that turns out not to be proportional recomputes it.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        kind = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(kind), weight.to(kind)
    grad = torch.is_grad_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(
            Tensor, cast(Any, _Chosen).apply(hidden.to(weight.dtype), weight, bias, labels, weights, shape, chunk, grad)
        )


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        shape: Shape,
        chunk: int,
        grad: bool,
    ) -> Tensor:
        wanted = [grad and need for need in ctx.needs_input_grad[:3]]
        trained = (wanted[1] or wanted[2]) and weights is not None
        sums = _Sums(hidden, weight, bias, wanted[0], trained)
        logps = [
            sums.add(rows, weight, bias, labels[rows], None if weights is None else weights[rows], shape, hidden)
            for rows in _slices(len(labels), chunk)
        ]
        ctx.shape, ctx.chunk, ctx.wanted = shape, chunk, wanted
        ctx.save_for_backward(hidden, weight, bias, labels, weights, sums.hidden, sums.weight, sums.bias)
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, weights, by_hidden, by_weight, by_bias = ctx.saved_tensors
        to_hidden = by_hidden * grad[:, None].to(by_hidden.dtype) if ctx.wanted[0] else None
        if not (ctx.wanted[1] or ctx.wanted[2]):
            return (to_hidden, *[None] * 7)
        factor = _common_factor(grad, weights)
        if factor is None:
            sums = _Sums(hidden, weight, bias, False, True)
            for rows in _slices(len(labels), ctx.chunk):
                sums.add(rows, weight, bias, labels[rows], grad[rows], ctx.shape, hidden)
            by_weight, by_bias, factor = sums.weight, sums.bias, grad.new_ones(())
        to_weight = (by_weight * factor).to(weight.dtype)
        to_bias = None if by_bias is None else (by_bias * factor).to(by_bias.dtype)
        return (to_hidden, to_weight, to_bias, *[None] * 5)


class _Sums:
    """Gradients of sum(weights * logps) as they grow chunk by chunk; those of `hidden` are for weight 1 a row."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, by_hidden: bool, trained: bool) -> None:
        self.hidden = torch.empty_like(hidden) if by_hidden else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if trained and bias is not None else None

    def add(
        self,
        rows: slice,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
        shape: Shape,
        hidden: Tensor,
    ) -> Tensor:
        """One chunk: its log-probabilities, and its part of the gradients."""
        here = hidden[rows]
        logits = shape.apply(linear(here, weight, bias).float())
        # d final / d raw of the soft-cap is scale * (1 - (final / cap)^2); without a cap it is one number
        slope = 1 - (logits / shape.cap).square() if shape.cap else None
        logits -= logits.amax(1, keepdim=True)
        picked = logits.gather(1, labels[:, None])[:, 0]
        mass = logits.exp_().sum(1)
        if self.hidden is None and self.weight is None:
            return picked - mass.log()
        at_label = torch.full_like(mass, shape.scale)
        if slope is not None:
            at_label = at_label * slope.gather(1, labels[:, None])[:, 0]
            logits *= slope
        spread = logits.to(weight.dtype)
        per_row = (shape.scale / mass).to(weight.dtype)
        if self.hidden is not None:
            gathered = weight[labels] * at_label[:, None].to(weight.dtype)
            self.hidden[rows] = gathered.sub_(through(spread, weight).mul_(per_row[:, None]))
        if self.weight is not None and weights is not None:
            self._add_trained(spread, per_row, at_label, labels, weights, here)
        return picked - mass.log()

    def _add_trained(
        self, spread: Tensor, per_row: Tensor, at_label: Tensor, labels: Tensor, weights: Tensor, here: Tensor
    ) -> None:
        total, scaled = cast(Tensor, self.weight), (weights * per_row.float()).to(spread.dtype)
        total.index_add_(0, labels, (here * (weights * at_label)[:, None]).float())
        if total.dtype == spread.dtype:
            total.addmm_(spread.T, here * scaled[:, None], alpha=-1)
        else:
            total.sub_((spread.T @ (here * scaled[:, None])).float())
        if self.bias is not None:
            self.bias.index_add_(0, labels, weights * at_label)
            self.bias.sub_((spread.float() * scaled.float()[:, None]).sum(0))


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _common_factor(grad: Tensor, weights: Tensor | None) -> Tensor | None:
    """The number f with grad = f * weights, or None."""
    if weights is None or not len(grad):
        return None if len(grad) else grad.new_zeros(())
    pivot = weights.abs().argmax()
    factor = grad[pivot] / weights[pivot]
    off = (grad - factor * weights).abs().max()
    return factor if bool(off <= 1e-6 * grad.abs().max()) else None


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
