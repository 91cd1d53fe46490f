"""What an answer was foretold to be is looked up beside its prompt, and is no part of what was said."""

from __future__ import annotations

from dataclasses import replace

from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.drafter import Ask
from llmkit.inference.speculation.ngram import Lookup
from llmkit.inference.steer import Rules, Steer

WORDS = 50


def drafted(lookup: Lookup, one: Sequence, count: int = 4) -> list[int]:
    steer = Steer(Rules(one.request, ()), [])
    return lookup.draft([Ask(one, count, steer)])[0].tokens


def begun(made: list[int], before: tuple[int, ...] = (), **asked: tuple[int, ...]) -> Sequence:
    request = Request("a", (1, 2, 3), Sampling(), **asked)
    return Sequence(request, 0, [*before, 1, 2, 3, *made], before=len(before))


def test_drafts_are_what_was_foretold_from_the_first_token_on() -> None:
    assert drafted(Lookup(WORDS), begun([10])) == []  # the control
    assert drafted(Lookup(WORDS), begun([10], prediction=(10, 11, 12, 13, 14))) == [11, 12, 13, 14]
    lookup, one = Lookup(WORDS), begun([10], prediction=(10, 11, 12, 13, 14))
    drafted(lookup, one)
    for token, follows in ((11, [12, 13, 14]), (40, []), (13, [14]), (1, [2, 3])):  # left, found again, and the prompt
        one.tokens.append(token)
        assert drafted(lookup, one) == follows, token


def test_texts_end_where_others_begin() -> None:
    one = begun([3], prediction=(3, 20))
    assert drafted(Lookup(WORDS), one) == [20]  # nothing after it, though more is wanted
    assert drafted(Lookup(WORDS), begun([20], prediction=(3, 20))) == []
    far = begun([10], prediction=(10, 11, WORDS, 12))
    assert drafted(Lookup(WORDS), far) == [11]  # what is no word of the vocabulary is not drafted


def test_virtual_tokens_and_other_answers_have_it_too() -> None:
    lookup, one = Lookup(WORDS), begun([10, 11], (WORDS, WORDS + 1), prediction=(10, 11, 12))
    assert drafted(lookup, one) == [12]
    other = one.fork(1)
    other.tokens.append(12)
    one.tokens += [30, 10]
    assert drafted(lookup, other) == [] and drafted(lookup, one) == [11, 30, 10, 11]
    assert drafted(lookup, replace(one, index=2)) == [11, 30, 10, 11]
