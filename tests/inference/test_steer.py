"""What moves logits, beside transformers' own processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from llmkit.core.errors import RecipeError
from llmkit.inference.request import Request, RequestError
from llmkit.inference.sampler import choose, pick
from llmkit.inference.sampling import Sampling
from llmkit.inference.steer import Rules, Steer
from llmkit.inference.text import Texts
from tests.conftest import make_tokenizer

WORDS = 50
PROMPT, MADE = (3, 4, 5, 3, 9), (7, 9, 7, 7, 20)


def steer(sampling: Sampling, made: tuple[int, ...] = MADE, ends: tuple[int, ...] = (), **more: Any) -> Steer:
    request = Request("a", PROMPT, sampling, processors=more.pop("processors", ()))
    return Steer(Rules(request, ends, **more), list(made))


def logits(seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(WORDS) * 3).astype(np.float32)


def by(processor: Any, row: np.ndarray) -> np.ndarray:
    ids = torch.tensor([[*PROMPT, *MADE]])
    return processor(ids, torch.from_numpy(row.copy())[None])[0].numpy()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_is_that_of_transformers(penalty: float) -> None:
    row = logits()
    wanted = by(theirs.RepetitionPenaltyLogitsProcessor(penalty), row)
    assert np.array_equal(steer(Sampling(repetition_penalty=penalty)).law(row), wanted)
    assert np.array_equal(row, logits())  # what was given is as it was


def test_presence_and_frequency_count_what_was_made_and_not_the_prompt() -> None:
    row = logits(1)
    law = steer(Sampling(presence_penalty=0.5, frequency_penalty=0.25)).law(row)
    taken = np.zeros(WORDS, np.float32)
    taken[[7, 9, 20]] = 0.5 + 0.25 * np.array([3, 1, 1])
    assert law == pytest.approx(row - taken, abs=1e-6)


def test_bad_words_are_those_of_transformers() -> None:
    bad = [(11,), (20, 6), (7, 20, 8), (9, 20, 8), (3, 9, 7), (1, 2), (9, 7, 9, 7, 7, 20, 30)]
    row = logits(2)
    for cut in range(len(MADE) + 1):
        ids = torch.tensor([[*PROMPT, *MADE[:cut]]])
        wanted = theirs.NoBadWordsLogitsProcessor([list(one) for one in bad])(ids, torch.from_numpy(row.copy())[None])
        assert np.array_equal(steer(Sampling(), MADE[:cut], bad=bad).law(row), wanted[0].numpy())


def test_bias_allowed_tokens_and_the_ends_before_their_time() -> None:
    row = logits(3)
    assert steer(Sampling(logit_bias={4: 2.5, 0: -1.0})).law(row)[[4, 0]] == pytest.approx(row[[4, 0]] + [2.5, -1.0])
    law = steer(Sampling(allowed_ids=(6, 8, 2), logit_bias={6: 1.0})).law(row)
    assert np.flatnonzero(np.isfinite(law)).tolist() == [2, 6, 8] and law[6] == pytest.approx(row[6] + 1)
    for least in (5, 6):
        held = steer(Sampling(min_tokens=least), ends=(2, 30)).law(row)
        early = theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), least, torch.tensor([2, 30]))
        assert np.array_equal(held, by(early, row))
    with pytest.raises(RequestError, match="no token may be made here"):
        pick(row, steer(Sampling(allowed_ids=(2,), min_tokens=9), ends=(2,)))


def test_what_goes_back_or_forks_is_as_it_was() -> None:
    how = Sampling(repetition_penalty=1.4, frequency_penalty=0.5, min_tokens=7)
    one, row = steer(how, ends=(2,), bad=[(7, 8)]), logits(4)
    before = one.law(row)
    other = one.fork(1)
    for token in (7, 2, 7):
        other.take(token)
    changed = other.law(row)
    fresh = steer(how, (*MADE, 7, 2, 7), (2,), bad=[(7, 8)])
    assert np.array_equal(changed, fresh.law(row)) and not np.array_equal(changed, before)
    assert np.array_equal(one.law(row), before)
    other.back(3)
    assert np.array_equal(other.law(row), before) and other.made == one.made and other.index == 1


def test_a_processor_moves_the_law_and_its_failure_is_its_request_s_alone() -> None:
    seen = []

    def only(prompt: Any, made: Any, law: torch.Tensor) -> torch.Tensor:
        seen.append((prompt, made))
        return torch.where(torch.arange(WORDS) == 13, law, -torch.inf)

    def broken(prompt: Any, made: Any, law: torch.Tensor) -> torch.Tensor:
        raise KeyError("gone")

    def short(prompt: Any, made: Any, law: torch.Tensor) -> torch.Tensor:
        return law[:3]

    def mad(prompt: Any, made: Any, law: torch.Tensor) -> torch.Tensor:
        return law.fill_(torch.nan)

    row = torch.from_numpy(logits(5))
    steers = [steer(Sampling(), processors=(one,)) for one in (only, broken, short, mad)]
    made = choose([row] * 5, [*steers, steer(Sampling())])
    assert made[0].id == 13 and seen == [(PROMPT, MADE)]
    assert "broken failed: KeyError" in str(made[1]) and isinstance(made[1].__cause__, KeyError)
    assert "gave (3,) where (50,)" in str(made[2]) and "nan" in str(made[3])
    assert made[4].id == int(row.argmax()) and torch.equal(row, torch.from_numpy(logits(5)))


def test_bad_words_become_tokens_with_and_without_a_space() -> None:
    tokenizer = make_tokenizer()
    found = Texts(tokenizer).bad(["model", " fox"])
    assert {tokenizer.decode(list(one)) for one in found} == {"model", " model", " fox"}
    assert Texts(tokenizer).bad([]) == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_tokens": 9, "max_tokens": 8},
        {"stop": ("x",) * 65},
        {"bad_words": ("x" * 2000,)},
        {"logit_bias": {1: 1e300}},
        {"repetition_penalty": 1e9},
        {"top_p": 0.0},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_every_field_is_bounded(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refused:
        Sampling(**wrong)
    assert next(iter(wrong)) in refused.value.problems[0].key


def test_penalties_by_index_are_those_over_the_whole_vocabulary() -> None:
    numbers, words = np.random.default_rng(3), 50
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4, max_tokens=400)
    prompt, made = tuple(numbers.integers(0, words, 5).tolist()), []
    one = Steer(Rules(Request("a", prompt, sampling), ()), made)
    for step in range(120):
        if step % 7 == 6:
            one.back(3)
        logits = numbers.standard_normal(words).astype(np.float32) * 4
        times = np.bincount(one.made, minlength=words).astype(np.int32)
        plain, seen = logits.copy(), (times > 0) | np.isin(np.arange(words), prompt)
        plain[seen] = np.where(plain[seen] > 0, plain[seen] / np.float32(1.3), plain[seen] * np.float32(1.3))
        plain -= np.float32(0.7) * (times > 0)
        plain -= np.float32(-0.4) * times
        fork = one.fork(1)
        fork.take(0)  # what another answer does is its own
        assert one.law(logits).tobytes() == plain.tobytes()
        one.take(int(numbers.integers(0, words)))


def test_what_a_processor_gives_stays_its_own() -> None:
    own = torch.from_numpy(logits(5))
    made = steer(Sampling(allowed_ids=(3, 4)), processors=(lambda prompt, made, row: own,))
    assert np.flatnonzero(np.isfinite(made.law(logits()))).tolist() == [3, 4]
    assert np.array_equal(own.numpy(), logits(5))
    made = steer(Sampling(min_tokens=9), ends=(2,), processors=(lambda prompt, made, row: row[:1].expand(WORDS),))
    assert np.isneginf(made.law(logits())).sum() == 1  # each number lies for itself
