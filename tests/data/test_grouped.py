"""Batches of groups: what each position sees, foretells and is of."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmkit.core.types import Packed, Tree
from llmkit.data.batches import micro_batches
from llmkit.data.groups import grouped
from llmkit.data.node import Data, FirstFit, Jsonl, NoPacking
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()
ROWS = [
    {"prompt": "the quick brown", "chosen": " fox jumps", "rejected": " dog"},
    {"prompt": "a", "chosen": " model", "rejected": " row of text"},
    {"prompt": "hello world", "chosen": " answer", "rejected": " question one two"},
]
WAYS = {
    "shared": (FirstFit(), True, True),
    "unshared": (FirstFit(), True, False),
    "padded": (NoPacking(), True, False),
    "padded, without contexts": (NoPacking(), False, False),
}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    path = tmp_path_factory.mktemp("groups") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = Data(train=(Jsonl(path=str(path)),), max_length=64)
    made = grouped(data.train, data, TOKENIZER)
    return replace(made, each={"reference": np.arange(len(made.ids), dtype=np.float32)})


def batches(groups, way, capacity=128, rows=1, rank=0, world=1):
    packing, contexts, trees = WAYS[way]
    return micro_batches(groups, range(len(groups)), packing, capacity, rows, contexts, "cpu", rank, world, trees)


def sequences(batch):
    """(tokens, positions) that each weighted position sees up to itself, and its label."""
    if batch.attend is None:
        places = [(row, 0, length, -1) for row, length in enumerate(batch.lengths)]
    else:
        places = [(s.row, s.start, s.end, s.parent) for s in batch.attend.segments]
    found = []
    for row, start, end, parent in places:
        before = [] if parent < 0 else list(range(*places[parent][1:3]))
        for at in range(start, end):
            if batch.weights[row, at]:
                seen = [*before, *range(start, at + 1)]
                found.append((batch.tokens[row, seen].tolist(), batch.positions[row, seen].tolist(), (row, at)))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_every_way_shows_the_same_to_every_label(groups, way):
    expected = {}
    for index in range(len(groups)):
        begin = int(groups.starts[index])
        for number, (first, last) in enumerate(groups.completions(index)):
            prompt = groups.ids[begin : groups.completions(index)[0][0]].tolist()
            for at in range(first, last):
                expected[index, number, at] = prompt + groups.ids[first:at].tolist()
    found = {}
    for batch in batches(groups, way, rows=2):
        of, number = batch.branches.of.tolist(), 0
        firsts = [batch.branches.group.tolist().index(g) for g in range(len(batch.ids))]
        for seen, positions, (row, at) in sequences(batch):
            assert positions == list(range(len(seen)))
            group = int(batch.branches.group[of[number]])
            key = batch.ids[group], of[number] - firsts[group], int(batch.branches.each["reference"][number])
            assert int(batch.labels[row, at]) == int(groups.ids[key[2]])
            found[key], number = seen, number + 1
        assert number == len(of) == int((batch.weights != 0).sum())
        assert batch.branches.per["label"].tolist() == [1.0, 0.0] * len(batch.ids)
    assert found == expected


def test_a_prompt_is_computed_once(groups):
    (one,) = batches(groups, "shared")
    (other,) = batches(groups, "unshared")
    assert isinstance(one.attend, Tree) and isinstance(other.attend, Packed)
    assert one.tokens.shape[1] == sum(groups.length(i) for i in range(3)) == len(groups.ids) - 3
    assert other.tokens.shape[1] == sum(groups.spread(i) for i in range(3)) > one.tokens.shape[1]
    tokens, labels, weights = groups.sample(0)
    (alone,) = micro_batches(groups, [0], FirstFit(), 128, 1, True, "cpu", trees=True)
    assert alone.tokens[0].tolist() == tokens.tolist() and alone.weights[0].tolist() == weights.tolist()
    assert (alone.labels[0] * (alone.weights[0] != 0)).tolist() == labels.tolist()


def test_rows_are_filled_and_dealt(groups):
    widest = max(groups.length(i) for i in range(3))
    alone = batches(groups, "shared", capacity=widest)
    assert [batch.ids for batch in alone] == [(0,), (1,), (2,)]
    dealt = [batches(groups, "shared", capacity=widest, rank=rank, world=2) for rank in (0, 1)]
    assert [[batch.ids for batch in part] for part in dealt] == [[(0,), (2,)], [(1,), (0,)]]
    idle = dealt[1][1]
    assert not idle.weights.any() and len(idle.branches.of) == len(idle.branches.group) == 0
    assert all(torch.equal(a.branches.of, b.branches.of) for a, b in zip(alone[::2], dealt[0], strict=True))
