"""A draft head beside the model that teaches it, as one module: texts in, how near its drafts come out.

Row t of a text knows its tokens up to t + 1 and the model's hidden states up to t. Step 0 drafts the token at t + 2
from these; step k drafts the one at t + 2 + k from its own outputs, as in use (training-time test, EAGLE-3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.types import Batch, Drafted, Packed, Segment
from llmkit.models.draft_head import DraftHead
from llmkit.models.draft_rows import Rows, attended, rows_of
from llmkit.models.draft_tapped import tapped
from llmkit.models.foretold import Rule, foretold, kept
from llmkit.models.heads import Headed, shape_of
from llmkit.models.memo import Memo


class Taught(Headed):
    """A head in training; the model is frozen, and asked once for each text."""

    def __init__(self, model: nn.Module, head: DraftHead, steps: int, rule: Rule, memo: Memo) -> None:
        """`steps`: drafts in turn; `rule`: their loss; `memo`: keeps the hidden states that the model makes."""
        super().__init__(model)
        self.head, self.steps, self.rule, self.memo = head, steps, rule, memo
        causal: Any = self.causal[0]
        self.logits = shape_of(causal.config.get_text_config())
        last = int(causal.config.get_text_config().num_hidden_layers)
        self.taps = (*head.taps, *(() if last in head.taps else (last,)))
        """What is asked of the model: the last hidden states are its law."""
        self.last = self.taps.index(last)
        whole = causal.get_output_embeddings()
        self.words: Tensor = whole.weight.detach()[head.ids].float()
        self.bias: Tensor | None = None if whole.bias is None else whole.bias.detach()[head.ids].float()

    def states(self, tokens: Tensor) -> Tensor:
        """The model's hidden states of a text (L,), end to end by tap, (L, taps x H)."""
        found = self.memo.get(tokens)
        if found is None:
            training = self.model.training
            self.model.eval()
            found = self.memo.put(tokens, torch.cat(tapped(self.model, tokens, self.taps), -1))
            self.model.train(training)
        return found.to(tokens.device, torch.float32)

    def forward(self, batch: Batch) -> Drafted:
        """The drafts after each row of a packed batch whose next token has a weight.

        Raises:
            ValueError: the batch is not packed.
        """
        if not isinstance(batch.attend, Packed) or len(batch.tokens) != 1:
            raise ValueError("a head learns from packed rows")
        segments, weights = batch.attend.segments, batch.weights[0]
        with torch.no_grad():
            states = torch.cat([self.states(batch.tokens[0, s.start : s.end]) for s in segments])
            states = states.unflatten(-1, (len(self.taps), -1))
            alive = _alive(weights, segments, self.steps)
            place = alive[:, 0].nonzero()[:, 0]
            alive = alive[place]
            used = (place[:, None] + 1 + torch.arange(self.steps, device=place.device))[alive].unique()
            laws = self.laws(states[used, self.last])
        features = self.head.features(states[:, : len(self.head.taps)].unbind(1))
        text = Text(batch.labels[0], batch.positions[0], weights, features, used, laws)
        return self._drafted(text, rows_of(place, segments), alive)

    def laws(self, last: Tensor) -> Tensor:
        """The model's law over the draft vocabulary after its last hidden states (M, H): (M, V)."""
        logits = last @ self.words.T
        return torch.softmax(self.logits.apply(logits if self.bias is None else logits + self.bias), 1)

    def _drafted(self, text: Text, rows: Rows, alive: Tensor) -> Drafted:
        """All steps, one after the other; `alive` (N, K) as in `_alive`."""
        head, going, own = self.head, rows, list[tuple[Tensor, Tensor]]()
        every = head.mixed(text.labels, text.features)
        keys, values = head.cached(every, text.positions)
        x, hidden = every[rows.place], text.features[rows.place]
        left = torch.arange(len(rows.place), device=rows.place.device)
        right, sums = torch.zeros_like(alive), list[tuple[Tensor, Tensor, Tensor]]()
        for step in range(self.steps):
            if step:
                stay = alive[left, step]
                left, going, hidden = left[stay], going.take(stay), hidden[stay]
                x = head.mixed(text.labels[going.place + step], hidden)
                own = [(key[stay], value[stay]) for key, value in own]
                own.append(head.cached(x, text.positions[going.place] + step))
            q = head.queries(x, text.positions[going.place] + step)
            hidden = head.finished(x, attended(going, q, keys, values, own))
            *found, best = self._foretold(text, going.place + 1 + step, hidden)
            sums.append((found[0], found[1], found[2]))
            right[left, step] = head.ids[best] == text.labels[going.place + 1 + step]
        losses, counts, common = zip(*sums, strict=True)
        return Drafted(losses, counts, common, rows.place, right.cumprod(1).bool())

    def _foretold(self, text: Text, places: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of outputs (N, H) that draft what comes after `places` (N,): the sums of `Drafted`, and the likeliest."""
        weights, at = text.weights[places], torch.searchsorted(text.used, places)
        read = self.head.normed(hidden).float()
        words = self.head.out.weight.float()
        loss, common, best = foretold(read, words, None, kept(lambda here: text.laws[at[here]], self.rule), weights)
        return loss, weights.sum(), (common * weights).sum(), best


@dataclass(frozen=True)
class Text:
    """A packed text of T tokens, as a head reads it."""

    labels: Tensor
    """(T,): of each token the next one."""
    positions: Tensor
    """(T,)"""
    weights: Tensor
    """(T,): of the labels."""
    features: Tensor
    """(T, H)"""
    used: Tensor
    """(M,): the places after which the model's law is known, in order."""
    laws: Tensor
    """(M, V)"""


def _alive(weights: Tensor, segments: Sequence[Segment], steps: int) -> Tensor:
    """(T, K): whether step k of row t drafts a token of the same text that has a weight, after others that have."""
    ends = torch.zeros(len(weights), dtype=torch.long, device=weights.device)
    for segment in segments:
        ends[segment.start : segment.end] = segment.end
    at = torch.arange(len(weights), device=weights.device)[:, None] + 1 + torch.arange(steps, device=weights.device)
    good = (at < ends[:, None] - 1) & (weights[at.clamp_max(len(weights) - 1)] > 0)
    return good.cumprod(1).bool()
