"""Losses of preference against their closed forms."""

import math

import pytest
import torch

from llmkit.core.types import Batch, Branches
from llmkit.losses.preference import sides
from llmkit.losses.preference_node import Dpo, Sides


def batch_of(lengths):
    """A batch of two completions for each prompt, of these lengths, and scores of its tokens."""
    flat = [length for pair in lengths for length in pair]
    of = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(flat))
    branches = Branches(of, torch.arange(len(flat)) // 2)
    total = sum(flat)
    row = torch.ones(1, total)
    return Batch(row.long(), row.long(), row.long(), row, None, (), branches=branches)


def pairs(chosen, rejected, tokens=(4, 2)):
    made = [torch.as_tensor(x, dtype=torch.float64) for x in (chosen, rejected)]
    return Sides(*made, *(torch.full_like(made[0], n) for n in tokens))


def test_sides_sum_the_tokens_of_each_completion():
    scores = -torch.arange(1.0, 11.0)
    one = sides(scores, batch_of([(2, 3), (4, 1)]))
    assert one.chosen.tolist() == [-3, -30] and one.rejected.tolist() == [-12, -10]
    assert one.chosen_tokens.tolist() == [2, 4] and one.rejected_tokens.tolist() == [3, 1]


def test_tokens_beyond_the_shorter_completion_count_by_the_tail():
    one = sides(-torch.arange(1.0, 11.0), batch_of([(2, 3), (4, 1)]), tail=0.5)
    assert one.chosen.tolist() == [-3, -6 - 12] and one.rejected.tolist() == [-3 - 4 - 2.5, -10]


def test_dpo_is_its_closed_form():
    policy, reference = pairs([-3.0, -5.0], [-4.0, -2.0]), pairs([-3.5, -5.0], [-3.0, -2.5])
    made = Dpo(beta=0.5)(policy, reference)
    margins = [0.5 * (0.5 + 1.0), 0.5 * (0.0 - 0.5)]
    assert made.losses.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in margins])
    assert made.figures["reward_margin"].tolist() == pytest.approx(margins)
    assert made.figures["accuracy"].tolist() == [1, 0]
