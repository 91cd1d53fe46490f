"""The compiled attention over blocks against its plain twin in fp64, and its one order of sums."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from llmkit_kernels import paged
from llmkit_kernels.build import lacks
from llmkit_kernels.paged import reference
from llmkit_kernels.paged.laid import Held, lay, rounded, tree
from torch import Tensor

pytestmark = pytest.mark.skipif(bool(lacks("paged")), reason=lacks("paged"))

Piece = tuple[int, int, int]
"""Tokens [start, end) of a sequence."""


@dataclass
class World:
    """Sequences of random queries, keys and values, whose blocks lie scattered."""

    lengths: tuple[int, ...]
    size: int = 64
    value: int = 64
    groups: int = 3
    heads: int = 2
    block: int = 16
    dtype: torch.dtype = torch.float32
    rule: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        drawn = [(self.heads * self.groups, self.size), (self.heads, self.size), (self.heads, self.value)]
        self.given = [[torch.randn(n, h, d, generator=g).transpose(0, 1) for h, d in drawn] for n in self.lengths]
        counts = [-(-n // self.block) for n in self.lengths]
        self.count = sum(counts) + 1
        order = list(range(self.count))
        random.Random(1).shuffle(order)
        self.tables = [[order.pop() for _ in range(n)] for n in counts]
        self.held = self.blocks()

    def blocks(self) -> Held:
        """Empty ones, but for what is no number where nobody reads."""
        lanes, columns = rounded(self.block), rounded(self.value)
        keys = torch.zeros(self.count, self.heads, self.size, lanes, dtype=self.dtype)
        values = torch.zeros(self.count, self.heads, lanes, columns, dtype=self.dtype)
        whole = self.dtype == torch.int8
        scales = [torch.full((self.count, self.heads, lanes), torch.nan) if whole else None for _ in range(2)]
        if not whole:
            keys.fill_(torch.nan)
            values[..., : self.value] = torch.nan
        return Held(keys, values, self.block, self.value, *scales)

    def step(self, pieces: list[Piece], parents: tuple[int, ...] = ()) -> list[Tensor]:
        """What comes of computing these together, each (L, H, Dv)."""
        runs, at = [], 0
        for which, start, end in pieces:
            runs.append((at, at + end - start, start, self.tables[which], parents))
            at += end - start
        q, k, v = (torch.cat([self.given[w][i][:, a:b] for w, a, b in pieces], 1) for i in range(3))
        laid = lay(runs, self.block, self.count)
        out = paged.attend(q, k, v, self.held, laid, self.size**-0.5, **self.rule)
        return list(out.split([end - start for _, start, end in pieces]))

    def twin(self, piece: Piece, parents: tuple[int, ...] = ()) -> Tensor:
        """The plain twin over what the blocks hold of its sequence."""
        which, start, end = piece
        keys, values = self.stored(which, end)
        q = self.given[which][0][:, start:end].double()
        rule = {name: x.double() if isinstance(x, Tensor) else x for name, x in self.rule.items()}
        return reference.attend(q, keys, values, start, self.size**-0.5, parents=parents, **rule)

    def stored(self, which: int, length: int) -> tuple[Tensor, Tensor]:
        """As they were read back, (KV, length, D) in fp64."""
        places = [self.tables[which][at // self.block] for at in range(length)]
        at = torch.arange(length) % self.block
        keys, values = self.held.keys[places, :, :, at].double(), self.held.values[places, :, at, : self.value].double()
        if self.held.key_scales is not None and self.held.value_scales is not None:
            keys = keys * self.held.key_scales[places, :, at][..., None]
            values = values * self.held.value_scales[places, :, at][..., None]
        return keys.transpose(0, 1), values.transpose(0, 1)


def close(a: Tensor, b: Tensor, tol: float = 3e-6) -> None:
    assert (a - b).abs().max() <= tol * b.abs().max()


def agrees(world: World, pasts: tuple[int, ...]) -> None:
    """A step of all that comes after `pasts` is what the twin says, over keys that earlier steps stored."""
    world.step([(i, 0, past) for i, past in enumerate(pasts) if past])
    pieces = [(i, past, n) for i, (past, n) in enumerate(zip(pasts, world.lengths, strict=True))]
    for piece, out in zip(pieces, world.step(pieces), strict=True):
        close(out.double(), world.twin(piece))


SHAPES = [(8, 8, 1, 2), (16, 24, 3, 2), (40, 40, 8, 1), (64, 64, 3, 3), (128, 80, 1, 1), (256, 256, 8, 1)]


@pytest.mark.parametrize("size,value,groups,heads", SHAPES)
@pytest.mark.parametrize("block", [4, 10, 16, 32])
def test_spans_of_any_length_after_any_past(size: int, value: int, groups: int, heads: int, block: int) -> None:
    agrees(World((1, 301, 260, 90, 18), size, value, groups, heads, block), (0, 1, 255, 89, 17))


@pytest.mark.parametrize("window", [1, 5, 100, 300])
@pytest.mark.parametrize("block", [10, 16])
def test_windows_shorter_and_longer_than_the_past(window: int, block: int) -> None:
    agrees(World((600, 301, 90, 3), block=block, rule={"window": window}), (599, 33, 40, 0))


def test_soft_caps_and_sinks() -> None:
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(2))
    agrees(World((70, 300), rule={"cap": 0.5}), (60, 299))
    agrees(World((70, 300), rule={"cap": 50.0, "window": 9}), (60, 0))
    agrees(World((70, 300), rule={"sinks": sinks}), (60, 299))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_narrow_caches_compute_in_fp32_what_they_hold(dtype: torch.dtype) -> None:
    world = World((70, 300), size=40, value=24, dtype=dtype)
    agrees(world, (60, 299))
    off = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.int8: 1 / 254}[dtype]
    for at in (1, 2):
        true = world.given[1][at]
        assert ((world.stored(1, 300)[at - 1] - true).abs() <= off * 1.01 * true.abs().amax(-1, keepdim=True)).all()


def test_halves_of_any_size_are_read_as_they_are() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        world = World((20,), 16, 16, 1, 1, dtype=dtype)
        bits = torch.arange(0, 2**16, 2**16 // 320 + 1)[:320] - 2**15
        numbers = bits.to(torch.int16).view(dtype)
        finite = torch.where(numbers.isfinite(), numbers, 0).float().view(1, 20, 16)
        world.given[0] = [torch.zeros(1, 20, 16), torch.zeros(1, 20, 16), finite]
        first = world.step([(0, 0, 1)])[0]
        assert torch.equal(first[0, 0], finite[0, 0])
        close(world.step([(0, 0, 20)])[0].double(), world.twin((0, 0, 20)))


@pytest.mark.parametrize("rule", [{}, {"window": 37}, {"cap": 2.0}, {"sinks": torch.ones(6)}], ids=["", "w", "c", "s"])
@pytest.mark.parametrize("dtype,block", [(torch.float32, 16), (torch.int8, 16), (torch.float32, 10)], ids=str)
def test_a_query_has_the_same_bits_however_its_sequence_came(rule: Any, dtype: torch.dtype, block: int) -> None:
    lengths = (530, 270, 64, 17)
    world = World(lengths, size=24, value=40, block=block, dtype=dtype, rule=rule)
    whole = world.step([(i, 0, n) for i, n in enumerate(lengths)])
    for seed in range(6):
        drawn = random.Random(seed)
        world.held = world.blocks()
        made: list[list[Tensor]] = [[] for _ in lengths]
        done = [0] * len(lengths)
        while open_ := [i for i, n in enumerate(lengths) if done[i] < n]:
            torch.set_num_threads(drawn.choice((1, 2, 3)))
            now = drawn.sample(open_, drawn.randint(1, len(open_)))
            pieces = [(i, done[i], min(lengths[i], done[i] + drawn.choice((1, 2, 16, 33, 300)))) for i in now]
            for (i, _, end), out in zip(pieces, world.step(pieces), strict=True):
                made[i].append(out)
                done[i] = end
        torch.set_num_threads(1)
        assert all(torch.equal(torch.cat(a), b) for a, b in zip(made, whole, strict=True))


def test_shared_blocks_are_read_by_all() -> None:
    world = World((40, 40), rule={})
    world.step([(0, 0, 32)])
    world.tables[1][:2] = world.tables[0][:2]
    for at in range(3):
        world.given[1][at][:, :32] = world.given[0][at][:, :32]
    apart = World((40, 40))
    apart.given[1] = world.given[1]
    assert torch.equal(world.step([(0, 32, 40), (1, 32, 40)])[1], apart.step([(1, 0, 40)])[0][32:])


PARENTS = (-1, 0, 0, 1, 1, 2, -1, 6, 3, 8, 9)


@pytest.mark.parametrize("window", [0, 1, 3, 40])
@pytest.mark.parametrize("past", [0, 5, 250])
def test_a_token_of_a_tree_sees_its_ancestors_alone(window: int, past: int) -> None:
    world = World((past + len(PARENTS),), rule={"window": window})
    if past:
        world.step([(0, 0, past)])
    piece = (0, past, past + len(PARENTS))
    out = world.step([piece], PARENTS)[0]
    close(out.double(), world.twin(piece, PARENTS))


def test_trees_of_64_and_what_is_no_tree() -> None:
    chain = tuple(range(-1, 63))
    world = World((70,), 16, 16, 1, 1)
    world.step([(0, 0, 6)])
    assert torch.equal(world.step([(0, 6, 70)], chain)[0], world.step([(0, 6, 70)])[0])
    assert tree(chain)[0][63] == -1  # all bits
    with pytest.raises(ValueError, match="token 1 of a tree has parent 1"):
        tree((-1, 1))
    for length, parents in ((65, tuple(range(-1, 64))), (3, (-1, 0))):
        with pytest.raises(ValueError, match=f"a tree of {length} tokens has {len(parents)} parents"):
            lay([(0, length, 0, range(5), parents)], 16, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(
    "past,block,window",
    [(0, 4, 0), (5, 4, 0), (13, 10, 0), (250, 16, 0), (255, 16, 0), (37, 16, 9), (14, 1, 0), (130, 100, 40)],
)
def test_a_path_of_a_tree_is_a_chain_to_the_bit(dtype: torch.dtype, past: int, block: int, window: int) -> None:
    drawn = random.Random(past)
    parents = tuple(drawn.randint(-1, at - 1) for at in range(12))
    rule: dict[str, Any] = {"window": window} if window else {}
    forest = World((past + 12,), 16, 24, block=block, dtype=dtype, rule=rule)
    if past:
        forest.step([(0, 0, past)])
    whole = forest.step([(0, past, past + 12)], parents)[0]
    for token in range(12):
        path = [token]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        chain = World((past + 12,), 16, 24, block=block, dtype=dtype, rule=rule)
        places = [*range(past), *(past + at for at in path)]
        chain.given = [[x[:, places] for x in chain.given[0]]]
        if past:
            chain.step([(0, 0, past)])
        assert whole[token].equal(chain.step([(0, past, past + len(path))])[0][-1]), token


@pytest.mark.parametrize("past", [0, 9, 251])
def test_what_is_no_number_in_a_branch_reaches_no_token_beside_it(past: int) -> None:
    drawn, wrong = random.Random(past), 3
    parents = tuple(drawn.randint(-1, at - 1) for at in range(40))
    below = {wrong}
    for at, parent in enumerate(parents):
        below |= {at} if parent in below else set()
    made = []
    for value in (None, torch.nan, torch.inf):
        world = World((past + 40,), 16, 24)
        if value is not None:
            for x in world.given[0][1:]:
                x[:, past + wrong] = value
        if past:
            world.step([(0, 0, past)])
        made.append(world.step([(0, past, past + 40)], parents)[0])
    others = [at for at in range(40) if at not in below]
    assert len(others) > 10 and all(one[others].equal(made[0][others]) for one in made[1:])
    assert all(one[wrong].isnan().any() for one in made[1:])


def test_tokens_of_no_span_give_zeros_and_are_not_stored() -> None:
    world = World((8,), 16, 16, 1, 1)
    q, k, v = world.given[0]
    out = paged.attend(q, k, v, world.held, lay([(2, 5, 0, world.tables[0], ())], 16, world.count), 0.25)
    assert not out[:2].any() and not out[5:].any() and out[2:5].all()
    assert int(world.held.values[world.tables[0][0], 0, :, 0].isfinite().sum()) == 3


def test_what_is_not_a_number_is_not_hidden_and_reaches_no_other() -> None:
    for dtype in (torch.float32, torch.int8):
        world = World((20, 20), 16, 16, 1, 1, dtype=dtype)
        world.given[0][1][0, 7] = torch.nan
        world.given[0][2][0, 9] = torch.inf
        first, second = world.step([(0, 0, 20), (1, 0, 20)])
        assert first[:7].isfinite().all() and first[9:].isnan().all() and second.isfinite().all()


def test_scores_of_any_size_stay_finite() -> None:
    world = World((300,), 16, 16, 2, 1)
    world.given[0][0] *= 300
    close(world.step([(0, 0, 300)])[0].double(), world.twin((0, 0, 300)), 1e-4)


def test_what_does_not_go_together_says_so() -> None:
    world = World((8,), 16, 16, 1, 1)
    q, k, v = world.given[0]
    laid = lay([(0, 8, 0, world.tables[0], ())], 16, world.count)
    with pytest.raises(ValueError, match="do not go with keys"):
        paged.attend(q[:, :7], k, v, world.held, laid, 1.0)
    with pytest.raises(ValueError, match="do not go into blocks"):
        paged.attend(q[..., :8], k[..., :8], v, world.held, laid, 1.0)
    assert not paged.suits(q.double(), k, v, 16) and not paged.suits(q, k, v, 512) and paged.suits(q, k, v, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("size", [6, 24, 64])
def test_queries_and_keys_are_turned_to_the_bit_as_torch_turns_them(size: int, dtype: torch.dtype) -> None:
    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    world = World((40, 7), size, size, dtype=dtype)
    g = torch.Generator().manual_seed(3)
    cos, sin = torch.randn(47, size, generator=g), torch.randn(47, size, generator=g)
    q, k, v = (torch.cat([world.given[w][i] for w in (0, 1)], 1) for i in range(3))
    laid = lay([(0, 40, 0, world.tables[0], ()), (40, 47, 0, world.tables[1], ())], world.block, world.count)
    first, second = world.held, world.blocks()
    want = paged.attend(turned(q), turned(k), v, first, laid, 0.3)
    assert paged.attend(q, k, v, second, laid, 0.3, turn=(cos, sin)).equal(want)
    assert all(a.nan_to_num().equal(b.nan_to_num()) for a, b in zip(first.tensors, second.tensors, strict=True))
    for wrong in ((cos[:3], sin[:3]), (cos.double(), sin)):
        with pytest.raises(ValueError, match="are not turned by"):
            paged.attend(q, k, v, second, laid, 0.3, turn=wrong)
    half = World((40, 7), size, size, dtype=torch.bfloat16).held
    with pytest.raises(ValueError, match="of this precision"):
        paged.attend(q, k, v, half, laid, 0.3, turn=(cos, sin))


@pytest.mark.parametrize("kept", [torch.float32, torch.int8])
def test_what_torch_makes_by_default_changes_nothing(kept: torch.dtype) -> None:
    """transformers sets it for the whole process while it loads a model."""
    want = World((21, 9), dtype=kept).step([(0, 0, 21), (1, 0, 9)])
    world = World((21, 9), dtype=kept)
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = world.step([(0, 0, 21), (1, 0, 9)])
        scales = Held.made(2, 16, (2, 8, 8), torch.int8, torch.device("cpu")).key_scales
    finally:
        torch.set_default_dtype(torch.float32)
    assert scales is not None and scales.dtype == torch.float32
    assert all(a.dtype == torch.float32 and a.equal(b) for a, b in zip(made, want, strict=True))
