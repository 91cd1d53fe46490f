"""What the model thought likely after a token when it last said what follows it: drafts without a text to look back at.

Token Recycling (Luo et al., arXiv:2408.08696): each row of logits that is computed anyhow, of drafts that were wrong
too, tells the likeliest tokens after one, and a tree of them is drafted the next time that it comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

import numpy as np
from llmkit_kernels import draw
from llmkit_kernels.build import lacks
from llmkit_kernels.draw import reference
from numpy.typing import NDArray
from torch import Tensor

TENANTS = 32
"""Of so many what was thought is kept: one must not learn from the time of an answer what another asked."""
ROWS = 64
"""Rows of a step that are looked at: where there are more, drafts are hardly worth their time."""


class Recycled:
    """The likeliest tokens after each token, of each tenant."""

    def __init__(self, words: int, kept: int) -> None:
        """`words`: of the vocabulary; `kept`: tokens after each."""
        self.words, self.kept = words, min(kept, words)
        self.tables: OrderedDict[str, NDArray[np.int32]] = OrderedDict()

    def see(self, tenant: str, tokens: Seq[int], logits: Tensor) -> None:
        """Logits (R, V) after each of `tokens` (R,)."""
        known = [at for at, token in enumerate(tokens[:ROWS]) if token < self.words]
        if known:
            top = _likeliest(logits[known] if len(known) < len(logits) else logits, self.kept)
            self._table(tenant)[[tokens[at] for at in known]] = top

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


def _likeliest(logits: Tensor, count: int) -> NDArray[np.int64]:
    """(R, count): the columns of the largest, in order."""
    if logits.device.type != "cpu":
        found: NDArray[np.int64] = logits.topk(count).indices.cpu().numpy()
        return found
    rows = np.ascontiguousarray(logits.float().numpy())
    return reference.likeliest(rows, count) if lacks("draw") else draw.likeliest(rows, count)
