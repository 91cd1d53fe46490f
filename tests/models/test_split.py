"""A row that several ranks hold: attention over it equals that over the whole row, in values and gradients."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llmkit.core.types import Batch, Packed, Segment, Split
from llmkit.models.attend import KINDS, attention
from llmkit.models.lengths import lengths
from llmkit.models.ring import plan
from llmkit.parallel.context import deal, split

SHAPES = {
    "crossing": (37, (5, 9, 1, 13, 9)),
    "one long": (41, (41,)),
    "many short": (40, (3,) * 13),
    "empty rank": (40, (4, 5)),
    "with gaps": (50, (7, -6, 20, -3, 11)),
    "short": (3, (3,)),
}
"""Tokens, and segments end to end; less than 0 is a gap."""


def segments(lengths):
    found, at = [], 0
    for length in lengths:
        if length > 0:
            found.append(Segment(0, at, at + length))
        at += abs(length)
    return tuple(found)


class Rooms:
    """What threads leave for each other."""

    def __init__(self, count):
        self.count, self.held = count, {}
        self.there = threading.Barrier(count, timeout=20)


class Threads:
    """Implements `Exchange` among threads."""

    def __init__(self, rooms, index):
        self.rooms, self.index, self.count = rooms, index, rooms.count
        self.sent = 0

    def gather(self, value):
        self.rooms.held[self.index] = value
        self.rooms.there.wait()
        found = [self.rooms.held[i] for i in range(self.count)]
        self.rooms.there.wait()
        return found

    def swap(self, chunks):
        self.sent += chunks.numel()
        return torch.stack([given[self.index] for given in self.gather(chunks)])

    def shift(self, tensors, by):
        self.sent += sum(t.numel() for t in tensors)
        found = self.gather([t.clone() for t in tensors])[(self.index - by) % self.count]
        return lambda: found


def everywhere(count, work):
    """`work(exchange)` of each of `count` ranks."""
    rooms = Rooms(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: work(Threads(rooms, index)), range(count)))


def placed(parts, splits, tokens, dim):
    """The ranks' parts, in the order of the row."""
    pieces = []
    for part, one in zip(parts, splits, strict=True):
        pieces += zip((a for a, _ in one.mine), part.split([b - a for a, b in one.mine], dim), strict=True)
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda p: p[0])], dim).narrow(dim, 0, tokens)


def made(tokens, heads, keys, size, values, dtype):
    torch.manual_seed(tokens + heads)
    shapes = ((heads, size), (keys, size), (keys, values), (heads, values))
    return [torch.randn(1, n, tokens, d, dtype=dtype) for n, d in shapes]


def alone(given, context, kind, **rule):
    q, k, v, grad = (x.clone().requires_grad_() for x in given)
    out, _ = attention(KINDS[kind])(None, q, k, v, attend=context, **rule)
    wanted = [q, k, v, *([rule["s_aux"]] if "s_aux" in rule else [])]
    found = torch.autograd.grad(out, wanted, grad.transpose(1, 2))
    return [out, *found]


def several(given, context, count, method, kind, **rule):
    """What `alone` gives, from `count` ranks; and their splits."""
    tokens = given[0].shape[2]
    held = deal(tokens, context.segments, count, method)
    end = max(b for part in held for _, b in part)
    filled = [torch.nn.functional.pad(x, (0, 0, 0, end - tokens)) for x in given]

    def work(exchange):
        one = Split(context, held, method, exchange)
        parts = [torch.cat([x[:, :, a:b] for a, b in one.mine], 2) for x in filled]
        own = dict(rule)
        if "s_aux" in rule:
            own["s_aux"] = rule["s_aux"].detach().clone().requires_grad_()
        return one, alone(parts, one, kind, **own)

    splits, found = zip(*everywhere(count, work), strict=True)
    columns = list(zip(*found, strict=True))
    whole = [placed(column, splits, tokens, dim) for column, dim in zip(columns[:4], (1, 2, 2, 2), strict=True)]
    return whole + [sum(column) for column in columns[4:]], splits


def near(ours, theirs, tol):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tol * b.abs().max(), float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_equal_the_whole(shape, count, method):
    tokens, lengths = SHAPES[shape]
    context = Packed(segments(lengths))
    for keys, window in ((2, None), (12, 5), (3, 2)):
        given = made(tokens, 12, keys, 8, 8, torch.float64)
        want = alone(given, context, "eager", sliding_window=window)
        found, _ = several(given, context, count, method, "sdpa", sliding_window=window)
        near(found, want, 1e-10)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("shape", ["crossing", "one long"])
def test_caps_sinks_and_values_of_another_size(shape, method):
    tokens, lengths = SHAPES[shape]
    context = Packed(segments(lengths))
    given = made(tokens, 4, 2, 8, 6, torch.float64)
    sinks = torch.randn(4, dtype=torch.float64).requires_grad_()
    for rule in ({"softcap": 2.0}, {"s_aux": sinks}, {"softcap": 1.0, "s_aux": sinks, "sliding_window": 7}):
        near(several(given, context, 4, method, "eager", **rule)[0], alone(given, context, "eager", **rule), 1e-10)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_blocks_of_a_long_row_in_fp32(method):
    context = Packed(segments((300, 700, 45)))
    given = made(1050, 4, 2, 16, 16, torch.float32)
    for kind in ("sdpa", "compiled"):
        for window in (None, 150):
            want = alone([x.double() for x in given], context, "eager", sliding_window=window)
            found, _ = several(given, context, 2, method, kind, sliding_window=window)
            near([x.double() for x in found], want, 1e-5)


def test_heads_that_do_not_divide_are_told():
    given = made(8, 3, 3, 8, 8, torch.float32)
    with pytest.raises(ValueError, match="3 heads cannot be dealt to 2 ranks"):
        several(given, Packed(segments((8,))), 2, "ulysses", "sdpa")


def test_what_sees_nothing_is_left_out():
    context = Packed(segments((10,) * 4))
    given = made(40, 4, 2, 8, 8, torch.float64)
    _, splits = several(given, context, 4, "ring", "sdpa")
    assert [one.exchange.sent for one in splits] == [0] * 4  # the ranks' parts are whole segments
    _, splits = several(given, Packed(segments((12, 12, 12))), 4, "ring", "sdpa")
    assert {len(plan(one, 0)) for one in splits} == {2}  # a segment reaches no further than the next rank
    assert all(one.exchange.sent for one in splits)


def test_a_long_row_is_dealt_evenly():
    long = segments((4096,))
    work = [
        sum(m.rows * m.keys for meetings in plan(one, 0) for m in meetings)
        for one in everywhere(4, lambda e: Split(Packed(long), deal(4096, long, 4, "ring"), "ring", e))
    ]
    assert max(work) == min(work)


def row(tokens, lengths, examples):
    ids = torch.arange(1, tokens + 1)[None]
    places = segments(lengths)
    positions = torch.zeros_like(ids)
    for s in places:
        positions[0, s.start : s.end] = torch.arange(s.end - s.start)
    weights = (ids % 3 == 0).float()
    return Batch(ids, positions, ids + 1, weights, Packed(places), tuple(range(examples)))


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_a_batch_is_dealt_whole(method):
    batch = row(41, (20, 2, 19), 3)
    parts = everywhere(3, lambda exchange: split(batch, exchange, method))
    splits = [part.attend for part in parts]
    for name in ("tokens", "positions", "labels", "weights"):
        whole = placed([getattr(part, name) for part in parts], splits, 41, 1)
        assert torch.equal(whole, getattr(batch, name)), name
    assert len({part.tokens.shape for part in parts}) == 1
    assert sum(float(part.weights.sum()) for part in parts) == float(batch.weights.sum())
    assert {example for part in parts for example in part.ids} == {0, 1, 2}
    noise = placed([lengths(part) for part in parts], splits, 41, 1)
    assert torch.equal(noise, lengths(batch))


def test_padded_rows_are_laid_end_to_end():
    batch = row(20, (9, -1, 10), 2)
    padded = Batch(
        *(x.view(2, 10) for x in (batch.tokens, batch.positions, batch.labels, batch.weights)),
        Packed((Segment(0, 0, 9), Segment(1, 0, 10))),
        (0, 1),
        (9, 10),
    )
    ours, theirs = (everywhere(2, lambda e, b=b: split(b, e, "ring"))[1] for b in (padded, batch))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.attend.whole == theirs.attend.whole and ours.lengths == ()
    with pytest.raises(ValueError, match="packed context"):
        everywhere(2, lambda e: split(Batch(*(batch.tokens,) * 4, None, (0,)), e, "ring"))
