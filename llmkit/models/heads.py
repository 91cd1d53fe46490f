"""The head: a causal language model that gives log-probabilities of chosen tokens (`logps.py`), never all logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from llmkit.core.errors import ModelError
from llmkit.core.matmul import lacking
from llmkit.core.types import Batch, Entropic, Needs, Packed, Scores, Tree
from llmkit.models.logits import Shape
from llmkit.models.logps import BLOCK, chosen_logps
from llmkit.models.logps_entropy import entropic_scores, entropy_of
from llmkit.models.logps_rows import row_logps, trained_rows
from llmkit.models.logps_spread import spread_scores
from llmkit.models.noise import Noise
from llmkit.models.virtual import hidden, virtual_tokens

T = TypeVar("T")
ROWS = 64
"""Positions whose whole logits are held at a time."""


def shape_of(config: Any) -> Shape:
    """The family's scale and soft-cap, by the names that transformers' configurations give them."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(
        getattr(config, "lm_head_multiplier", None) or 1.0
    )
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Shape(scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))


def causal_of(model: Any) -> Any:
    """A causal language model, without what peft has put around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def whole(batch: Batch) -> Tensor:
    """Which tokens of padded rows are no padding, (B, T)."""
    ends = torch.tensor(batch.lengths, device=batch.tokens.device)
    return torch.arange(batch.tokens.shape[1], device=ends.device)[None] < ends[:, None]


class Headed(nn.Module):
    """A model of transformers, perhaps with an adapter, whose last hidden states a head reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.causal: Any = [causal_of(model)]  # in a list: the same modules must not be registered twice
        self.noise: Noise | None = None
        self.fills = True
        """Whether a row may get more tokens on its way through the model, where products with it are faster so."""

    def disturb(self, alpha: float) -> None:
        """From now on embeddings get noise in training (NEFTune, arXiv:2310.05914)."""
        self.noise = Noise(self.causal[0].get_input_embeddings(), alpha)

    def inside(self, work: Callable[[], T]) -> T:
        """Does work that reads the model's weights as a forward of this module does: under a strategy that cuts them
        they are at hand in here, and nowhere else."""
        return work()

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, (B, T, H)."""
        noise = self.noise.over(batch) if self.noise is not None and self.training else nullcontext()
        with noise:
            return self._hidden(batch)

    def _hidden(self, batch: Batch) -> Tensor:
        if virtual_tokens(self.model):
            return hidden(self.model, self.causal[0].base_model, batch)
        context: dict[str, Any] = {"attend": batch.attend}
        if batch.attend is None:
            context = {"attention_mask": whole(batch)}
        decoder, more = self.causal[0].base_model, self._lacking(batch)
        tokens, positions = (pad(x, (0, more)) if more else x for x in (batch.tokens, batch.positions))
        out = decoder(input_ids=tokens, position_ids=positions, use_cache=False, **context)
        return cast(Tensor, out.last_hidden_state[:, : batch.tokens.shape[1]])

    def _lacking(self, batch: Batch) -> int:
        """Tokens of no segment that a row gets: nobody attends to them."""
        noisy = self.noise is not None and self.training  # each of its tokens draws
        alone = len(batch.tokens) == 1 and isinstance(batch.attend, Packed | Tree)
        return lacking(batch.tokens[0]) if alone and self.fills and not noisy else 0


class Scored(Headed):
    """A causal language model and its head as one module: all that reads weights happens inside `forward`."""

    def __init__(self, model: nn.Module, words: int | None = None) -> None:
        super().__init__(model)
        causal = self.causal[0]
        self.shape = shape_of(causal.config.get_text_config())
        self.words = words or len(causal.get_output_embeddings().weight)
        """Rows of the vocabulary that are the tokenizer's: families pad it."""

    def forward(self, batch: Batch, needs: Needs = Needs()) -> Tensor | Scores | Entropic:
        """Log-probabilities of `batch.labels` where `batch.weights` is not 0, row by row: (N,), fp32; or what else a
        loss `needs`."""
        return self.read(self.hidden(batch), batch, needs)

    def read(self, hidden: Tensor, batch: Batch, needs: Needs) -> Tensor | Scores | Entropic:
        """The same of hidden states (B, T, H) that are there."""
        chosen = (batch.weights != 0).nonzero(as_tuple=True)  # once: a device is waited for
        if needs.spread:
            return self.scores(hidden[chosen], batch.labels[chosen])
        if needs.entropy:
            return self.entropies(hidden[chosen], batch.labels[chosen], needs)
        weights = batch.weights[chosen] if needs.by_weight else None
        return self.logps(hidden[chosen], batch.labels[chosen], weights, needs.temperature)

    def likeliest(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the likeliest token at each of those places: (N,), (N,)."""
        hidden = self.hidden(batch)
        chosen = batch.weights != 0
        head = self.causal[0].get_output_embeddings()
        rows = hidden[chosen]
        best = [self.shape.apply(head(part).float()).argmax(1) for part in rows.split(ROWS)]
        return self.logps(rows, batch.labels[chosen]), torch.cat(best)

    def logps(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of `labels` (N,) after hidden states (N, H); `weights` as in `chosen_logps`."""
        head, shape = self.causal[0].get_output_embeddings(), self.shape.at(temperature)
        if type(head) is nn.Linear:
            return chosen_logps(hidden, head.weight, head.bias, labels, weights, shape)
        if (some := trained_rows(head)) is not None:
            return row_logps(hidden, some, labels, shape)
        return self._wrapped(head, hidden, labels, shape, lambda logits, logps: ())[0]

    def scores(self, hidden: Tensor, labels: Tensor) -> Scores:
        """`Scores` of `labels` (N,) after hidden states (N, H)."""
        head = self.causal[0].get_output_embeddings()
        if type(head) is nn.Linear:
            return spread_scores(hidden, head.weight, head.bias, labels, self.words, self.shape)

        def more(logits: Tensor, logps: Tensor) -> tuple[Tensor, ...]:
            return torch.logsumexp(logits, 1), logps[:, : self.words].mean(1)

        return Scores(*self._wrapped(head, hidden, labels, self.shape, more))

    def entropies(self, hidden: Tensor, labels: Tensor, needs: Needs) -> Entropic:
        """`Entropic` of `labels` (N,) after hidden states (N, H)."""
        head, shape = self.causal[0].get_output_embeddings(), self.shape.at(needs.temperature)
        trained = needs.entropy == "trained"
        if type(head) is nn.Linear:
            return entropic_scores(hidden, head.weight, head.bias, labels, trained, shape)

        def more(logits: Tensor, logps: Tensor) -> tuple[Tensor, ...]:
            return (entropy_of(logps if trained else logps.detach()),)

        return Entropic(*self._wrapped(head, hidden, labels, shape, more))

    def _wrapped(
        self,
        head: nn.Module,
        hidden: Tensor,
        labels: Tensor,
        shape: Shape,
        more: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    ) -> list[Tensor]:
        """Log-probabilities of the labels, and what `more` makes of the logits and all log-probabilities, through a
        head that is more than a linear (an adapter sits on it); each chunk is made again in the backward."""
        positions, words = BLOCK[hidden.device.type]
        rows = max(16, positions * words // self.words)

        def run(h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            logits = shape.apply(head(h).float())
            logps = torch.log_softmax(logits, 1)
            return logps.gather(1, y[:, None])[:, 0], *more(logits, logps)

        chunks = zip(hidden.split(rows), labels.split(rows), strict=True)
        # also of no positions: other ranks wait for this one's backward pass, and for the gradients of all parameters
        parts = [checkpoint(run, h, y, use_reentrant=False) for h, y in chunks]
        return [torch.cat(column) for column in zip(*parts, strict=True)]


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
