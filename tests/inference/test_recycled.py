"""What a model thought likely after a token is drafted when the token comes again, and nothing of another tenant's."""

from __future__ import annotations

import pytest
import torch

from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.branched import Branched
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.ngram import Lookup
from llmkit.inference.speculation.recycled import ROWS, TENANTS, Recycled
from llmkit.inference.steer import Rules, Steer

WORDS = 12


def row(*likeliest: int) -> torch.Tensor:
    """(V,): logits of which these are the largest, in order."""
    logits = torch.linspace(-2, -1, WORDS)
    for rank, token in enumerate(likeliest):
        logits[token] = 10.0 - rank
    return logits


def ask(tokens: list[int], count: int, nodes: int, tenant: str = "") -> Ask:
    """Drafts after a prompt of these."""
    request = Request("a", tokens, Sampling(), tenant=tenant)
    return Ask(Sequence(request, 0, list(tokens)), count, Steer(Rules(request, ()), []), nodes)


def paths(draft: Draft) -> set[tuple[int, ...]]:
    """The texts that a tree drafts."""
    made: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        made.append((*(made[parent] if parent >= 0 else ()), token))
    return set(made)


def test_the_likeliest_come_in_their_order() -> None:
    known = Recycled(WORDS, 3)
    known.see([("", [4, 5], torch.stack([row(7, 1, 9), row(2, 8, 4)]))])
    assert known.after("", 4) == [7, 1, 9]
    assert known.after("", 5) == [2, 8, 4]
    assert known.after("", 7) == []


def test_the_newest_thought_counts() -> None:
    known = Recycled(WORDS, 2)
    known.see([("", [4], row(7, 1)[None])])
    known.see([("", [4, 4], torch.stack([row(3, 1), row(5, 6)]))])
    assert known.after("", 4) == [5, 6]


def test_virtual_tokens_are_no_one_s() -> None:
    known = Recycled(WORDS, 2)
    known.see([("", [WORDS + 3, 4], torch.stack([row(7, 1), row(3, 2)]))])
    assert known.after("", 4) == [3, 2]
    assert known.after("", WORDS + 3) == []


def test_another_tenant_s_thoughts_are_not_known() -> None:
    known = Recycled(WORDS, 2)
    known.see([("anna", [4], row(7, 1)[None])])
    assert known.after("anna", 4)
    assert not known.after("ben", 4)


def test_of_many_tenants_the_newest_are_kept() -> None:
    known = Recycled(WORDS, 2)
    for number in range(TENANTS + 2):
        known.see([(str(number), [4], row(7, 1)[None])])
        known.see([("first", [4], row(7, 1)[None])])
    assert len(known.tables) == TENANTS
    assert known.after("first", 4)
    assert not known.after("0", 4)


def test_a_wide_step_is_looked_at_in_part() -> None:
    known = Recycled(WORDS, 2)
    known.see([("", [at % 8 for at in range(ROWS)] + [9], torch.stack([row(7, 1)] * (ROWS + 1)))])
    assert known.after("", 7)
    assert not known.after("", 9)


def test_more_than_the_vocabulary_is_all_of_it() -> None:
    known = Recycled(3, 8)
    known.see([("", [1], torch.tensor([[0.0, 2.0, 1.0]]))])
    assert known.after("", 1) == [1, 2, 0]


def test_a_tree_joins_what_was_said_and_what_was_thought() -> None:
    known = Recycled(WORDS, 3)
    known.see([("", [1, 2], torch.stack([row(2, 6, 7), row(3, 8, 9)]))])
    draft = Branched(Lookup(WORDS), known).draft([ask([1, 2, 5, 0, 1], 3, 60)])[0]
    found = paths(draft)
    assert {(2,), (2, 5), (2, 5, 0)} <= found, "what was said"
    assert {(6,), (7,), (2, 3), (2, 8)} <= found, "what was thought"
    assert len(found) == len(draft.tokens), "no two branches are one text"
    assert max(map(len, found)) == 3


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_a_tree_is_no_larger_than_asked(nodes: int) -> None:
    known = Recycled(WORDS, 3)
    known.see([("", list(range(WORDS)), torch.stack([row(at, (at + 1) % WORDS, 3) for at in range(WORDS)]))])
    assert len(Branched(Lookup(WORDS), known).draft([ask([1, 2, 1], 9, nodes)])[0].tokens) == nodes


def test_nothing_known_is_nothing_drafted() -> None:
    assert Branched(Lookup(WORDS), Recycled(WORDS, 3)).draft([ask([1, 2, 3], 4, 8)])[0].tokens == []
