"""The exact laws of a model of a few words: what each text of some tokens is to come with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from llmkit.core.types import Paged, Span
from llmkit.inference.runner import Forward
from llmkit.inference.sampling import Sampling
from llmkit.inference.speculation.toy import closed
from llmkit.models.paged import BlockStore

SIZE = 4


@torch.no_grad()
def after(forward: Forward, texts: Sequence[Sequence[int]], sampling: Sampling) -> NDArray[np.float64]:
    """(n, V): the law of the token after each text."""
    spans: list[Span] = []
    start = block = 0
    for text in texts:
        need = -(-len(text) // SIZE)
        spans.append(Span(0, start, start + len(text), 0, tuple(range(block, block + need))))
        start, block = start + len(text), block + need
    ids = torch.tensor([token for text in texts for token in text])
    places = torch.tensor([at for text in texts for at in range(len(text))])
    hidden = forward.hidden(ids, places, Paged(BlockStore(block, SIZE), tuple(spans)), [""] * len(spans))
    rows = forward.logits(hidden[[span.end - 1 for span in spans]])
    return np.stack([closed(row, sampling) for row in rows.float().numpy()])


def joint(
    forward: Forward, words: int, prompt: Sequence[int], length: int, sampling: Sampling
) -> dict[tuple[int, ...], float]:
    """The law of the `length` tokens after a prompt, multiplied out in fp64."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        rows = after(forward, [[*prompt, *text] for text in law], sampling)
        steps = zip(law.items(), rows, strict=True)
        law = {(*text, word): chance * row[word] for (text, chance), row in steps for word in range(words)}
    return law


def texts(words: int, length: int) -> list[tuple[int, ...]]:
    """All texts of so many tokens."""
    return list(product(range(words), repeat=length))
