"""What a head's cache has of the answers of one request."""

from __future__ import annotations

import torch

from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.followed import Following


def test_an_answer_that_parts_from_the_first_never_takes_the_blocks_that_it_copies() -> None:
    """The first was last drafted for some turns ago, and the cache is full."""
    copies: list[tuple[int, int]] = []
    following = Following(2, 4, lambda source, target: copies.append((source, target)))
    request = Request("a", (1, 2, 3, 4, 5), Sampling(n=2, max_tokens=20))
    first = Sequence(request, 0, [1, 2, 3, 4, 5, 6, 7, 8], names=[b"of the empty prefix"])
    held, entries = following.of(first, {first: [(at, at) for at in range(7)]})
    assert following.room.reserve(held, 7)
    following.note(first, entries, torch.zeros(1))
    following.room.turn = 5
    other = first.fork(1)
    other.tokens[-1] = 30
    its, new = following.of(other, {})
    assert its.places == [0, 1, 2, 3] and its.blocks == held.blocks[:1] and its.at == 4 and not new
    assert held.places == list(range(7)) and not copies  # there was no room for a copy of the second block
