"""Look-ups in a corpus equal a search through all of it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmkit.core.errors import DataError, ModelError
from llmkit.inference.speculation.corpus import DEEP, SEEN, Corpus, indexed, ordered, save


def corpus(*texts: list[int], words: int = 100) -> Corpus:
    return Corpus(*indexed([np.array(text, np.int32) for text in texts], words))


def places(texts: list[list[int]], end: list[int]) -> list[tuple[int, list[int]]]:
    """(length, what follows) of every place in the texts, by the tokens before it that equal the end of a text."""
    found = []
    for text in texts:
        for at in range(len(text) + 1):
            length = 0
            while length < min(at, len(end), DEEP) and text[at - 1 - length] == end[-1 - length]:
                length += 1
            found.append((length, text[at:]))
    return found


@pytest.mark.parametrize("words", [3, 9, 1 << 16, 1 << 20])
def test_the_longest_end_and_what_most_of_its_places_went_on_with(words: int) -> None:
    drawn = random.Random(words)
    letters = [0, 1, 2, words - 2, words - 1] if words > 9 else list(range(words))
    for _ in range(40):
        texts = [[drawn.choice(letters) for _ in range(drawn.randint(1, 30))] for _ in range(drawn.randint(1, 4))]
        made = corpus(*texts, words=words)
        assert made.count == sum(map(len, texts)) + len(texts)
        for _ in range(20):
            end = [drawn.choice(letters) for _ in range(drawn.randint(1, 5))]
            if drawn.random() < 0.5:
                text = drawn.choice(texts)
                end += text[: drawn.randint(0, len(text))]
            found, all = made.follows(end, 5), places(texts, end)
            longest = max(length for length, _ in all)
            assert found.length == longest
            rows = [row for length, row in all if length == longest]
            if not longest or len(rows) > SEEN:
                continue
            for at, (token, share) in enumerate(zip(found.tokens, found.shares, strict=True)):
                rows = [row for row in rows if len(row) > at]
                counts = Counter(row[at] for row in rows)
                assert counts[token] == max(counts.values()) == pytest.approx(share * len(rows))
                rows = [row for row in rows if row[at] == token]
            assert len(found.tokens) == 5 or all_ended(rows, len(found.tokens))


def all_ended(rows: list[list[int]], at: int) -> bool:
    return all(len(row) <= at for row in rows)


def test_the_order_is_that_of_the_tokens_from_each_place_on() -> None:
    drawn = np.random.default_rng(0)
    for size in (1, 2, 50, 300):
        tokens = drawn.integers(0, 3, size)
        order = ordered(tokens).tolist()
        assert sorted(order) == list(range(size))
        keys = [tuple(tokens[at : at + DEEP].tolist()) for at in order]
        assert keys == sorted(keys)


def test_texts_do_not_run_into_each_other() -> None:
    made = corpus([1, 2, 3], [4, 5])
    assert made.follows([2, 3], 4).tokens == []
    assert made.follows([3, 4], 4).length == 1  # 3 and 4 never stood side by side
    assert made.follows([2], 4).tokens == [3]


def test_one_token_and_no_token() -> None:
    made = corpus([7])
    assert (made.follows([7], 3).length, made.follows([7], 3).tokens) == (1, [])
    assert made.follows([6], 3).length == made.follows([], 3).length == 0
    with pytest.raises(DataError, match="0 tokens make no corpus"):
        corpus([], [])


def test_ids_beyond_the_vocabulary() -> None:
    with pytest.raises(DataError, match=r"text 1 holds token 100, and the vocabulary has 100"):
        corpus([1], [100])
    made = corpus([1, 2, 3])
    assert made.follows([70_000, 1, 2], 2).tokens == [3]  # a token of an adapter's own is none of a corpus
    assert made.follows([1, 70_000], 2).length == 0


def test_a_shorter_end_than_asked_for_is_none() -> None:
    made = corpus([1, 2, 3, 4])
    assert made.follows([9, 2, 3], 1, least=3).tokens == []
    assert made.follows([1, 2, 3], 1, least=3).tokens == [4]


def test_many_places_are_looked_at_by_some_of_them() -> None:
    made = corpus(*[[5, 6, 7]] * 1000, *[[5, 6, 8]] * 10)
    found = made.follows([5, 6], 3)
    assert found.tokens == [7]
    assert found.shares[0] > 0.9


def test_files_that_are_not_as_they_were_written_are_refused(tmp_path: Path) -> None:
    said = {"words": 100, "tokens": 7}
    backwards, order = indexed([np.array([1, 99, 3]), np.array([4, 5])], 100)
    save(tmp_path, backwards, order)
    assert Corpus.load(tmp_path, said).follows([1, 99], 2).tokens == [3]
    for odd, why in (
        (said | {"tokens": 8}, "has 7 tokens, and draft.json says 8"),
        ({}, "has 7 tokens, and draft.json says None"),
        (said | {"words": 99}, "holds token 99, and draft.json says words: 99"),
        (said | {"words": "many"}, "is of no vocabulary, and draft.json says words: 'many'"),
    ):
        with pytest.raises(ModelError, match=rf"its corpus {why}; fix: run kind: draft again"):
            Corpus.load(tmp_path, odd)
    whole = (tmp_path / "backwards.npy").read_bytes()
    for raw in (b"", whole[:5], whole[:-3]):
        (tmp_path / "backwards.npy").write_bytes(raw)
        with pytest.raises(ModelError, match="its corpus cannot be read"):
            Corpus.load(tmp_path, said)
    (tmp_path / "backwards.npy").write_bytes(whole[:-2] + bytes([1, 0]))
    with pytest.raises(ModelError, match="holds token 256, and draft.json says words: 100"):
        Corpus.load(tmp_path, said)
