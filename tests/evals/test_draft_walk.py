"""The walk through a text: as many steps as an engine takes that drafts a chain in each."""

from __future__ import annotations

import random

import torch

from llmkit.core.types import Drafted
from llmkit.evals.drafting import Walk


def drafted(rows: list[int], right: list[int], depth: int) -> Drafted:
    none = (torch.zeros(()),) * depth
    table = torch.arange(depth)[None] < torch.tensor(right)[:, None]
    return Drafted(none, none, none, torch.tensor(rows), table)


def plainly(answer: int, right: dict[int, int], depth: int) -> tuple[int, int, list[int]]:
    """Of an answer's tokens all but the first, which comes with the prompt, step by step."""
    at, steps, tokens, kept = 1, 0, 0, [0] * depth
    while at < answer:
        some = right[at]
        steps, tokens = steps + 1, tokens + min(some + 1, answer - at)
        kept = [n + (place < some) for place, n in enumerate(kept)]
        at += some + 1
    return steps, tokens, kept


def test_it_takes_the_steps_of_a_plain_walk() -> None:
    drawn = random.Random(0)
    for _ in range(50):
        depth, walk, start = drawn.randint(1, 5), Walk(), 0
        wanted, rows, right = [0, 0, [0] * depth], list[int](), list[int]()
        for _ in range(drawn.randint(1, 3)):  # texts of one packed row
            prompt, answer = drawn.randint(2, 4), drawn.randint(1, 9)
            table = {at: drawn.randint(0, min(depth, answer - at)) for at in range(answer)}
            for at in range(answer):  # row prompt - 2 + at drafts from the answer's token at - 1 on
                rows.append(start + prompt - 2 + at)
                right.append(table[at])
            steps, tokens, kept = plainly(answer, table, depth)
            wanted = [wanted[0] + steps, wanted[1] + tokens, [a + b for a, b in zip(wanted[2], kept, strict=True)]]
            start += prompt + answer
        walk.take(drafted(rows, right, depth))
        assert [walk.steps, walk.tokens, walk.kept] == wanted


def test_an_answer_whose_drafts_are_all_right_and_one_without_any() -> None:
    walk = Walk()
    walk.take(drafted([*range(9)], [3, 3, 3, 3, 3, 3, 3, 2, 1], 3))  # eight tokens after the first
    assert (walk.steps, walk.tokens, walk.kept) == (2, 8, [2, 2, 2])
    walk = Walk()
    walk.take(drafted([*range(9)], [0] * 9, 3))
    assert (walk.steps, walk.tokens, walk.kept) == (8, 8, [0, 0, 0])
