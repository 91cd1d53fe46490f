"""Rows on several ranks under other strategies and beside other axes: many models and ways in one group of ranks."""

import copy

import numpy as np
import pytest
import torch

from llmkit.adapters.node import Lora, NoAdapter
from llmkit.build.context import by_context
from llmkit.build.precision import types
from llmkit.build.training import build, parts
from llmkit.core.ranks import ranks
from llmkit.core.sliced import Slice
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit, NoPacking
from llmkit.data.prepare import Prepared
from llmkit.losses.node import CrossEntropy
from llmkit.models.load import How
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.parallel.grid import grid
from llmkit.parallel.group import joined
from llmkit.parallel.node import Ddp, Fsdp, Parallel
from llmkit.parallel.optimizers import Optimizers
from tests.adapters.properties import FAMILIES, folder
from tests.distributed import together

COMPOSED = {
    "ddp": Parallel(strategy=Ddp(), context=2, replicate=2, shard=1),
    "fsdp": Parallel(strategy=Fsdp(), context=2, shard=2),
    "copies": Parallel(strategy=Fsdp(), context=2, shard=1, replicate=2),
    "tensor": Parallel(tensor=2, context=2),
    "tensor, fsdp": Parallel(strategy=Fsdp(), tensor=2, context=2),
}
WAYS = {
    "lora, ring": (Lora(rank=4), "ring", FirstFit(), 1, 0),
    "lora, ulysses, 3 rows, recompute": (Lora(rank=4), "ulysses", FirstFit(), 3, 1),
    "full, ring, 3 rows, recompute": (NoAdapter(), "ring", FirstFit(), 3, 1),
    "full, ulysses": (NoAdapter(), "ulysses", FirstFit(), 1, 0),
    "full, ring, padded": (NoAdapter(), "ring", NoPacking(), 2, 0),
}
"""Adapter, method, packing, rows of a micro-batch, layers that run twice."""
LENGTHS = (5, 40, 9, 7, 33, 12, 21, 60, 3, 18)
"""Of the examples of a step, in rows of 64 tokens; windows are 16."""


def examples():
    """The second half of each is trained on."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    ids = (np.arange(starts[-1], dtype=np.int32) * 37 + 11) % 380 + 5
    weights = np.concatenate([np.arange(n) >= n // 2 for n in LENGTHS]).astype(np.float32)
    return Prepared(ids, weights, starts, ())


def built(family, way):
    ref = ModelRef(name=str(folder(family)))
    adapter, _, _, _, recompute = WAYS[way]
    made = build(resolve(ref), ref, How(), adapter, recompute, 0)
    made.model.train()
    return made


def steps_of(made, way, parallel, place):
    given = parts(made, lambda params: Optimizers([torch.optim.SGD(params.values(), lr=0.05)]), types("fp32", "cpu"))
    return parallel.stepper(by_context(given, made.loaded, WAYS[way][1], place), place)


def trained(made, way, parallel, place=None):
    """Losses and norms of three steps, and what they leave here of the weights."""
    steps, (_, _, packing, rows, _) = steps_of(made, way, parallel, place), WAYS[way]
    index, count = (place.degrees.data_index(place.rank), place.degrees.data) if place else (0, 1)
    data, said = examples(), []
    supervised = sum(data.supervised(i) for i in range(len(LENGTHS)))
    for _ in range(3):
        given = micro_batches(data, tuple(range(len(LENGTHS))), packing, 64, rows, True, "cpu", index, count)
        sums = steps.accumulate(given, CrossEntropy(), supervised, len(given))
        said += [float(sums.total / sums.count), norm := steps.grad_norm()]
        steps.step(1.0, 0.0, norm)
    return said, {key: value for key, value in steps.state().items() if key.startswith("param/")}


def gap(ours, theirs):
    """Of this rank's part of a tensor from the whole one, relative to its largest value."""
    part, here = ours, ()
    if isinstance(ours, Slice):
        part, here = ours.tensor, tuple(slice(a, a + n) for a, n in zip(ours.start, ours.tensor.shape, strict=True))
    return float((part - theirs[here]).abs().max() / theirs.abs().max()) if part.numel() else 0.0


def compared(world, parallel, families, ways, tmp_path):
    cases = {}
    for case in ((family, way) for way in ways for family in families):
        made = built(*case)
        before = {f"param/{name}": p.detach().clone() for name, p in made.trained.items()}
        whole = copy.deepcopy(made)
        cases[case] = made, trained(whole, case[1], Parallel())
        moved = {name: gap(before[name], value) for name, value in cases[case][1][1].items()}
        assert sorted(moved.values())[len(moved) // 2] > 1e-3  # the control: most of it has moved

    def work(rank):
        with joined(ranks(), "cpu") as peers:
            place = grid(parallel.degrees(world), "cpu", peers)
            for case, (made, (numbers, weights)) in cases.items():
                said, held = trained(made, case[1], parallel, place)
                for ours, theirs in zip(said, numbers, strict=True):
                    assert abs(ours - theirs) <= 1e-5 * abs(theirs), (case, said, numbers)
                assert held.keys() == weights.keys()
                worst = max((gap(value, weights[name]), name) for name, value in held.items())
                assert worst[0] <= 1e-5, (case, worst)

    together(world, work, tmp_path, 400.0)


@pytest.mark.parametrize("strategy", COMPOSED)
def test_strategies(strategy, tmp_path):
    """With sliding windows, in the middle of a row and over its border; the slow test has the rest."""
    compared(4, COMPOSED[strategy], ["gemma3"], ["full, ring, 3 rows, recompute"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", COMPOSED)
def test_strategies_and_families(strategy, tmp_path):
    compared(4, COMPOSED[strategy], sorted(FAMILIES), WAYS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_parts_and_families(world, tmp_path):
    """The 4 heads of each cannot be dealt to 3 ranks."""
    ways = [way for way in WAYS if world != 3 or WAYS[way][1] == "ring"]
    compared(world, Parallel(context=world), sorted(FAMILIES), ways, tmp_path)
