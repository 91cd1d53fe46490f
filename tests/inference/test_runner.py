"""What the runner asks of a model: one forward a step, and logits of those rows alone that somebody reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkit.core.types import Paged
from llmkit.inference.request import Request
from llmkit.inference.runner import TOGETHER, Runner
from llmkit.inference.scheduler import Chunk
from llmkit.inference.sequence import Sequence as One
from llmkit.models.paged import BlockStore

WORDS = 7


class Fake:
    """Hidden states that are token and position; logits that tell them."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.forwards: list[Paged] = []

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Paged, adapters: Sequence[str]) -> Tensor:
        self.forwards.append(attend)
        return torch.stack([tokens, positions], 1).float()

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return hidden[:, :1] + hidden[:, 1:] / 1000 + torch.arange(WORDS) * 10.0


def chunk(tokens: list[int], start: int, end: int) -> Chunk:
    one = One(Request("a", tuple(tokens)), 0, tokens)
    one.blocks = [0]
    return Chunk(one, start, end)


def told(token: int, place: int) -> Tensor:
    return torch.tensor([token + place / 1000]) + torch.arange(WORDS) * 10.0


def test_rows_that_nobody_reads_are_not_made() -> None:
    model = Fake()
    chunks = [chunk([5, 6, 7, 8], 0, 2), chunk([1, 2, 3], 2, 3), chunk([4, 9], 0, 2)]  # the first goes on
    rows = Runner(model, BlockStore(8, 4)).run(chunks, [False] * 3)
    assert model.rows == [2]
    torch.testing.assert_close(rows[1][-1], told(3, 2))
    torch.testing.assert_close(rows[2][-1], told(9, 1))
    assert model.rows == [2]
    assert [(s.start, s.end, s.past, s.blocks) for s in model.forwards[0].spans] == [
        (0, 2, 0, (0,)),
        (2, 3, 2, (0,)),
        (3, 5, 0, (0,)),
    ]


def test_logits_of_a_long_prompt_are_made_in_slices() -> None:
    model, tokens = Fake(), [i % WORDS for i in range(200)]
    rows = Runner(model, BlockStore(50, 4)).run([chunk(tokens, 0, 200)], [True])[0]
    for at in range(200):
        torch.testing.assert_close(rows[at], told(tokens[at], at))
    assert max(model.rows) <= TOGETHER and sum(model.rows) <= 200 + 1
    assert len(model.forwards) == 1 and len(rows) == 200


def test_a_step_of_prompts_that_go_on_makes_no_logits() -> None:
    model = Fake()
    Runner(model, BlockStore(8, 4)).run([chunk([1, 2, 3, 4], 0, 3)], [False])
    assert model.rows == []
