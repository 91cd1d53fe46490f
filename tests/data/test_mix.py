"""Mixes: shares over any stretch, schedules, temperature, epochs; the order of one set stays what it was."""

import json
import random
import re
from itertools import pairwise

import numpy as np
import pytest

from llmkit.core.errors import DataError, RecipeError
from llmkit.data.documents import chunked
from llmkit.data.mix import Mix, Turns, shares, weight_at
from llmkit.data.mixed import Mixed, arranged
from llmkit.data.node import Data, Jsonl
from llmkit.data.order import Order, permutation
from llmkit.data.prepare import prepare


def mixture(sizes, lengths, weights, per_step=4, steps=None, seed=0, **mix):
    begins = [0, *np.cumsum(sizes).tolist()]
    return Mixed(seed, begins, np.array(lengths), weights, Mix(**mix), per_step, steps)


def worst(sources, amounts, asked, window):
    """How far the shares of any stretch of `window` are from those asked for."""
    off, many = 0.0, len(asked)
    total = np.concatenate([[0], np.cumsum(amounts)])
    ends = np.searchsorted(total, total + window)
    for source in range(many):
        own = np.concatenate([[0], np.cumsum(np.where(np.array(sources) == source, amounts, 0))])
        for start, end in enumerate(ends):
            if end < len(total):
                off = max(off, abs((own[end] - own[start]) / (total[end] - total[start]) - asked[source]))
    return off


LENGTHS = {
    "one long": lambda rng, source: 2048 if source else 64,
    "any": lambda rng, source: rng.randint(2, 2048),
    "two": lambda rng, source: rng.choice([40, 2048]),
    "one rare": lambda rng, source: 2048 if rng.random() < 0.05 else 33,
}


@pytest.mark.parametrize("weights", [[1, 1], [9, 1], [6, 2, 1, 0.5, 0.5], [93, *[1] * 7]], ids=str)
@pytest.mark.parametrize("kind", LENGTHS)
def test_shares_by_tokens_hold_over_any_million_tokens(kind, weights):
    rng, turns, asked = random.Random(0), Turns(), shares(weights, 1.0)
    drawn, amounts, total = [], [], 0
    while total < 1_500_000:
        drawn.append(turns.next(asked))
        amounts.append(LENGTHS[kind](rng, drawn[-1]))
        turns.drawn(drawn[-1], amounts[-1], asked)
        total += amounts[-1]
    assert worst(drawn, amounts, asked, 1_000_000) < 0.005
    assert worst(drawn, amounts, asked, 10_000) > 0.005  # of a window that a few rows fill, it cannot hold


def test_shares_by_rows_hold_over_any_stretch():
    made = mixture([50, 30, 20], [7] * 100, [5, 3, 2], by="rows")
    ids = [i for step in range(500) for i in made.step(step)[1]]
    sources = [0 if i < 50 else 1 if i < 80 else 2 for i in ids]
    assert worst(sources, [1] * len(ids), [0.5, 0.3, 0.2], 100) <= 0.02


def test_every_source_gives_each_of_its_rows_once_a_pass_in_another_order_each_time():
    made = mixture([6, 14], [3] * 20, [1, 1], by="rows")
    ids = [i for step in range(40) for i in made.step(step)[1]]
    first, second = [i for i in ids if i < 6], [i for i in ids if i >= 6]
    for own, size in ((first, 6), (second, 14)):
        passes = [own[at : at + size] for at in range(0, len(own) - size, size)]
        assert all(len(set(one)) == size for one in passes)
        assert passes[0] != passes[1]


def test_a_step_is_the_same_whoever_asks_and_whatever_was_asked_before():
    sizes, lengths = [9, 5, 30], [3 + i % 11 for i in range(44)]
    one, other = (mixture(sizes, lengths, [1, 2, 3]) for _ in range(2))
    straight = [one.step(k) for k in range(60)]
    assert other.step(57) == straight[57] and [other.step(k) for k in range(60)] == straight
    assert mixture(sizes, lengths, [1, 2, 3], seed=1).step(0) != straight[0]


@pytest.mark.parametrize("stop,draws", [("first_exhausted", 20), ("all_exhausted", 60)])
def test_an_epoch_ends_with_the_first_source_or_with_all(stop, draws):
    made = mixture([10, 30], [5] * 40, [1, 1], by="rows", stop=stop)
    assert made.steps_per_epoch == draws // 4
    assert made.step(draws // 4 - 1)[0] == 0 and made.step(draws // 4)[0] == 1


def test_temperature_flattens_and_weights_follow_the_run():
    assert shares([9.0, 1.0], 1.0) == pytest.approx([0.9, 0.1])
    assert shares([9.0, 1.0], 2.0) == pytest.approx([0.75, 0.25])
    assert shares([9.0, 1.0], 1e6) == pytest.approx([0.5, 0.5], abs=1e-5)
    line = ((0.0, 1.0), (0.5, 0.2), (1.0, 0.2))
    assert [weight_at(line, part) for part in (0, 0.25, 0.5, 0.9, 1)] == pytest.approx([1, 0.6, 0.2, 0.2, 0.2])
    changing = mixture([500, 500], [10] * 1000, [line, ((0.0, 0.0), (1.0, 1.0))], steps=200, by="rows")
    ids = [i for step in range(200) for i in changing.step(step)[1]]
    parts = [sum(i >= 500 for i in ids[at : at + 200]) / 200 for at in range(0, 800, 200)]
    assert parts == sorted(parts) and parts[0] < 0.25 < 0.7 < parts[-1]


@pytest.fixture
def two(tmp_path):
    for name, count in (("a", 12), ("b", 4)):
        rows = [{"prompt": f"{name} {i}", "completion": "hello world " * (1 + i % 3)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda weights, **data: Data(
        train=tuple(
            Jsonl(path=str(tmp_path / f"{name}.jsonl"), weight=weight)
            for name, weight in zip("ab", weights, strict=True)
        ),
        **data,
    )


def test_without_weights_all_rows_are_shuffled_together_as_before(two, tokenizer):
    data = two([None, None])
    order = arranged(data, prepare(data.train, data, tokenizer), 3, 4, None)
    assert isinstance(order, Order)
    assert order.step(5) == (1, tuple(permutation(3, 1, 16)[4:8].tolist()))


def test_temperature_alone_takes_the_sizes_of_sources(two, tokenizer):
    data = two([None, None], mix=Mix(by="rows", temperature=2.0))
    order = arranged(data, prepare(data.train, data, tokenizer), 3, 4, None)
    ids = [i for step in range(100) for i in order.step(step)[1]]
    assert sum(i < 12 for i in ids) / 400 == pytest.approx(3**0.5 / (1 + 3**0.5), abs=0.01)


def test_a_source_of_a_mix_without_examples_is_an_error(two, tokenizer, tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "b", "completion": "word " * 300}) + "\n")
    data = two([1.0, 1.0], max_length=64)
    with pytest.raises(DataError, match=r"data\.train\.1: has a share, and no row of it is left"):
        arranged(data, prepare(data.train, data, tokenizer), 3, 4, None)


@pytest.mark.parametrize(
    "weights,data,said",
    [
        ([1.0, None], {}, "train.1.weight: .*is missing"),
        ([1.0, 0.0], {}, "train.1.weight: 0 is no share"),
        ([1.0, ((0.5, 1.0),)], {}, "train.1.weight: its points do not ascend"),
        ([1.0, ((0.0, -1.0),)], {}, "train.1.weight: a share is below 0"),
        ([1.0, ((0.0, 1.0, 3.0),)], {}, "train.1.weight: a point is no pair"),
        ([((0.0, 1.0), (0.5, 0.0)), ((0.0, 0.0), (0.2, 1.0), (0.4, 0.0))], {}, "no source has a share at 0.5"),
        ([None, None], {"mix": Mix(by="rows")}, "mix: .*nothing is mixed"),
        ([None, None], {"streaming": True}, "the sizes of streams are not known"),
        ([None, None], {"buffer": 7}, "buffer: .*is of a stream"),
    ],
)
def test_what_is_no_mix_is_refused(two, weights, data, said):
    with pytest.raises(RecipeError) as caught:
        two(weights, **data)
    assert re.search(said, str(caught.value))


def test_a_chunk_of_documents_is_of_one_source_of_a_mix(two, tokenizer):
    data = two([1.0, 3.0], max_length=24)
    made = chunked(data.train, data, tokenizer, True)
    assert made.begins[0] == 0 and made.begins[-1] == len(made) and len(made.begins) == 3
    names = [{place[0][-7] for place in made.places[start:end]} for start, end in pairwise(made.begins)]
    assert names == [{"a"}, {"b"}]
    plain = two([None, None], max_length=24)
    apart = [chunked((source,), plain, tokenizer, True) for source in plain.train]
    assert np.array_equal(made.ids, np.concatenate([one.ids for one in apart]))
    assert arranged(data, made, 0, 2, None).steps_per_epoch > 0
