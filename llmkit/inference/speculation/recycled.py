"""What the model thought likely after a token when it last said what follows it: drafts without a text to look back at.

Token Recycling (Luo et al., arXiv:2408.08696): each row of logits that is computed anyhow, of drafts that were wrong
too, tells the likeliest tokens after one, and a tree of them is drafted the next time that it comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

import numpy as np
import torch
from llmkit_kernels import draw
from llmkit_kernels.build import lacks
from llmkit_kernels.draw import reference
from numpy.typing import NDArray
from torch import Tensor

TENANTS = 32
"""Of so many what was thought is kept: one must not learn from the time of an answer what another asked."""
ROWS = 64
"""Rows of a step that are looked at: where there are more, drafts are hardly worth their time."""


Seen = tuple[str, Seq[int], Tensor]
"""A tenant, tokens (R,) of its text, and the logits (R, V) after each."""


class Recycled:
    """The likeliest tokens after each token, of each tenant."""

    def __init__(self, words: int, kept: int) -> None:
        """`words`: of the vocabulary; `kept`: tokens after each."""
        self.words, self.kept = words, min(kept, words)
        self.tables: OrderedDict[str, NDArray[np.int32]] = OrderedDict()

    def see(self, seen: Seq[Seen]) -> None:
        """What a step says of these."""
        rows, left = list[Seen](), ROWS
        for tenant, tokens, logits in seen:
            if left > 0:
                rows.append((tenant, tokens[:left], logits[:left]))
                left -= len(tokens)
        for (tenant, tokens, _), top in zip(rows, _likeliest([logits for *_, logits in rows], self.kept), strict=True):
            known = [at for at, token in enumerate(tokens) if token < self.words]
            self._table(tenant)[[tokens[at] for at in known]] = top[known]

    def after(self, tenant: str, token: int) -> list[int]:
        """The likeliest first; none where it never came."""
        table = self.tables.get(tenant)
        if table is None or token >= self.words or table[token, 0] < 0:
            return []
        return [int(one) for one in table[token]]

    def _table(self, tenant: str) -> NDArray[np.int32]:
        if tenant not in self.tables:
            self.tables[tenant] = np.full((self.words, self.kept), -1, np.int32)
            if len(self.tables) > TENANTS:
                self.tables.popitem(last=False)
        self.tables.move_to_end(tenant)
        return self.tables[tenant]


def _likeliest(logits: Seq[Tensor], count: int) -> list[NDArray[np.int64]]:
    """Of each (R, V) the columns of the largest of its rows, in order, (R, count); a device is waited for once."""
    if not logits or logits[0].device.type == "cpu":
        rows = [np.ascontiguousarray(each.float().numpy()) for each in logits]
        return [reference.likeliest(row, count) if lacks("draw") else draw.likeliest(row, count) for row in rows]
    found = torch.cat(list(logits)).topk(count).indices.cpu()
    return [part.numpy() for part in found.split([len(each) for each in logits])]
