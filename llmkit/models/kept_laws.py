"""A teacher's laws of texts, asked for once: of each place the likeliest words, and what is left for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmkit.core.errors import ResourceError
from llmkit.core.types import Batch, Packed
from llmkit.models.memo import Memo

Some = tuple[Tensor, Tensor]
"""Words (n, k) and their log-probabilities with that of all others behind them (n, k + 1); (n, k) where k is all."""


class KeptLaws:
    """Laws by the text that they are of, and by which of its places have a weight."""

    def __init__(self, path: Path, top_k: int, words: int, of: str) -> None:
        """`top_k` of `words` words are kept; `of`: what else the laws are made with."""
        self.top_k = min(top_k, words)
        self.told = self.top_k + (self.top_k < words)
        self.memo = Memo(path, self.top_k + self.told, of, torch.int32)

    def lacks(self, batch: Batch) -> bool:
        """Whether a text of the batch is not there, or was hurt."""
        return any(self.memo.get(text) is None for text, _ in texts(batch))

    def put(self, batch: Batch, ids: Tensor, log_law: Tensor) -> None:
        """Keeps what the teacher says after the places of a batch that have a weight, as `Some`."""
        at = 0
        for text, count in texts(batch):
            rows = [ids[at : at + count].int(), log_law[at : at + count].float().contiguous().view(torch.int32)]
            self.memo.put(text, torch.cat([part.cpu() for part in rows], 1))
            at += count

    def of(self, batch: Batch) -> Callable[[slice], Some]:
        """A slice of the places that have a weight -> what is kept of them.

        Raises:
            ResourceError: a text is not there any more.
        """
        found = [self._one(text) for text, _ in texts(batch)]
        rows = torch.cat(found) if found else torch.zeros(0, self.top_k + self.told, dtype=torch.int32)
        device = batch.tokens.device
        ids = rows[:, : self.top_k].to(device, torch.int64)
        laws = rows[:, self.top_k :].contiguous().view(torch.float32).to(device)
        return lambda here: (ids[here], laws[here])

    def _one(self, text: Tensor) -> Tensor:
        if (rows := self.memo.get(text)) is None:
            what = "does not have what the teacher says of a text"
            raise ResourceError(what, fix="run the same command again: it is made anew", file=str(self.memo.path))
        return rows


def texts(batch: Batch) -> Iterator[tuple[Tensor, int]]:
    """Of each text of a batch that has places with a weight: its tokens and which those are, (2 L,), and how many."""
    if isinstance(batch.attend, Packed):
        parts = [(one.row, one.start, one.end) for one in batch.attend.segments]
    else:
        parts = [(row, 0, length) for row, length in enumerate(batch.lengths)]
    for row, start, end in parts:
        chosen = batch.weights[row, start:end] != 0
        if count := int(chosen.sum()):
            yield torch.cat([batch.tokens[row, start:end], chosen.long()]), count


def likeliest(logits: Tensor, top_k: int, temperature: float) -> Some:
    """The `top_k` likeliest words of laws (n, V) at a temperature, and what is left."""
    laws = torch.log_softmax(logits / temperature, 1)
    best, ids = laws.topk(top_k, 1)
    if top_k == laws.shape[1]:
        return ids, best
    rest = torch.logsumexp(laws.scatter(1, ids, -torch.inf), 1, keepdim=True)
    return ids, torch.cat([best, rest], 1)
