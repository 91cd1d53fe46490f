"""Attention over a row that several ranks hold, with keys and values that travel (Ring Attention, arXiv 2310.01889).

Each rank keeps its queries. Keys and values go round the ring, one rank a hop, and each stop gives a partial softmax;
partial ones are merged by the log of their mass (`lse`). The backward pass makes the scores again from that, sends keys
and values round once more and their gradients with them, and home at the end. Which queries meet which keys is planned
once a batch (`plan`): pairs of stretches that see nothing are left out, and the ring stops after the last hop that any
rank has a use for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkit.core.types import Segment, Split
from llmkit.models.pieces import QUERY_BLOCK, Rule


@dataclass(frozen=True)
class Meeting:
    """Queries [q, q + rows) of this rank's tokens over keys [k, k + keys) of a visiting part.

    `ahead`: how far the first query is after the first key in the row; query i sees key j where j <= ahead + i.
    """

    q: int
    rows: int
    k: int
    keys: int
    ahead: int


@dataclass(frozen=True)
class Stay:
    """A rank's tokens [place, place + end - start) are [start, end) of the row."""

    start: int
    end: int
    rank: int
    place: int


@lru_cache(maxsize=16)
def plan(split: Split, window: int) -> tuple[tuple[Meeting, ...], ...]:
    """What this rank's queries meet after 0, 1, ... hops; as many hops for every rank."""
    mine, count = split.exchange.index, split.exchange.count
    stays = _stays(split.held)
    met: list[list[Meeting]] = [[] for _ in range(count)]
    hops, first = 0, 0
    for segment in sorted(split.whole.segments, key=lambda s: s.start):
        while stays[first].end <= segment.start:
            first += 1
        here = [part for part in map(lambda stay: _within(stay, segment), _until(stays, first, segment.end))]
        for at, asked in enumerate(here):
            for seen in here[: at + 1]:
                if (meeting := _meeting(asked, seen, window)) is not None:
                    hop = (asked.rank - seen.rank) % count
                    hops = max(hops, hop)
                    if asked.rank == mine:
                        met[hop].append(meeting)
    return tuple(map(tuple, met[: hops + 1]))


def _stays(held: Sequence[Sequence[tuple[int, int]]]) -> list[Stay]:
    """Of all ranks, in the order of the row."""
    found = []
    for rank, part in enumerate(held):
        place = 0
        for start, end in part:
            found.append(Stay(start, end, rank, place))
            place += end - start
    return sorted(found, key=lambda stay: stay.start)


def _until(stays: list[Stay], first: int, end: int) -> list[Stay]:
    last = first
    while last < len(stays) and stays[last].start < end:
        last += 1
    return stays[first:last]


def _within(stay: Stay, segment: Segment) -> Stay:
    start = max(stay.start, segment.start)
    return Stay(start, min(stay.end, segment.end), stay.rank, stay.place + start - stay.start)


def _meeting(asked: Stay, seen: Stay, window: int) -> Meeting | None:
    """Cut to what the window leaves: None where that is nothing."""
    k = max(seen.start, asked.start - window + 1) if window else seen.start
    end = min(asked.end, seen.end - 1 + window) if window else asked.end
    if k >= seen.end or end <= asked.start:
        return None
    at = seen.place + k - seen.start
    return Meeting(asked.place, end - asked.start, at, seen.end - k, asked.start - k)


def ring(q: Tensor, k: Tensor, v: Tensor, split: Split, rule: Rule) -> Tensor:
    """q (1, H, T / N, D), k (1, KV, T / N, D), v (1, KV, T / N, Dv) -> (1, T / N, H, Dv), of no segment zeros.

    Raises:
        ValueError: attention dropout, which would have to be drawn alike in both passes.
    """
    if rule.dropout:
        raise ValueError("a ring knows no attention dropout")
    device = q.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    given = (x[0].to(kind) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        out = cast(Tensor, cast(Any, _Ring).apply(*given, rule.sinks, split, rule))
    return out.transpose(0, 1)[None]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, split: Split, rule: Rule) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2], dtype=wide)
        lse = q.new_full(q.shape[:2], -inf, dtype=wide)
        hops, visiting = plan(split, rule.window), [k.contiguous(), v.contiguous()]
        for hop, meetings in enumerate(hops):
            coming = split.exchange.shift(visiting, 1) if hop + 1 < len(hops) else None
            for m in meetings:
                for part in _blocks(m, rule.window):
                    _merge(out, lse, part, q, visiting, rule)
            visiting = coming() if coming is not None else visiting
        if sinks is not None:  # a key without a value, which every query of a segment sees
            whole = torch.logaddexp(lse, sinks.to(wide)[:, None])
            out.mul_(torch.exp(lse - whole)[..., None])
            lse = torch.where(lse == -inf, lse, whole)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.split, ctx.rule = split, rule
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        split, rule = ctx.split, ctx.rule
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        to_q = torch.zeros_like(q, dtype=lse.dtype)
        hops, visiting = plan(split, rule.window), [k.contiguous(), v.contiguous()]
        sums = [torch.zeros_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in visiting]
        for hop, meetings in enumerate(hops):
            more = hop + 1 < len(hops)
            coming = split.exchange.shift(visiting, 1) if more else None
            for m in meetings:
                for part in _blocks(m, rule.window):
                    _back(to_q, sums, part, (q, *visiting), (grad, delta, lse), rule)
            if coming is not None:
                visiting, sums = coming(), split.exchange.shift(sums, 1)()
        if len(hops) > 1:
            sums = split.exchange.shift(sums, 1 - len(hops))()
        to_sinks = None
        if sinks is not None:
            mass = torch.where(lse == -inf, 0.0, torch.exp(sinks.to(lse.dtype)[:, None] - lse))
            to_sinks = -(mass * delta).sum(1).to(sinks.dtype)
        return to_q.to(q.dtype), sums[0].to(k.dtype), sums[1].to(v.dtype), to_sinks, None, None


def _blocks(m: Meeting, window: int) -> list[Meeting]:
    """A meeting in blocks of queries, each over the keys that some of them see."""
    found = []
    for at in range(0, m.rows, QUERY_BLOCK):
        rows, ahead = min(QUERY_BLOCK, m.rows - at), m.ahead + at
        first = max(0, ahead - window + 1) if window else 0
        found.append(Meeting(m.q + at, rows, m.k + first, min(m.keys, ahead + rows) - first, ahead - first))
    return found


def _scores(m: Meeting, q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """(KV, groups, rows, keys) in fp32 or better: scores with -inf where nothing is seen, and the slope of the cap."""
    queries = q[:, m.q : m.q + m.rows].unflatten(0, (k.shape[0], -1))
    scores = (queries @ k[:, None, m.k : m.k + m.keys].transpose(2, 3)).to(_wide(q)) * rule.scale
    slope = scores.new_ones(())
    if rule.cap:
        bent = torch.tanh(scores / rule.cap)
        scores, slope = bent * rule.cap, 1 - bent.square()
    if m.ahead < m.keys - 1 or (rule.window and m.ahead + m.rows > rule.window):
        apart = torch.arange(m.ahead, m.ahead + m.rows, device=q.device)[:, None]
        apart = apart - torch.arange(m.keys, device=q.device)[None]
        hidden = (apart < 0) | (apart >= rule.window) if rule.window else apart < 0
        scores = scores.masked_fill(hidden, -inf)
    return scores, slope


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _merge(out: Tensor, lse: Tensor, m: Meeting, q: Tensor, visiting: Sequence[Tensor], rule: Rule) -> None:
    """Adds a partial softmax to the running one, (H, T, Dv) and (H, T)."""
    k, v = visiting
    scores, _ = _scores(m, q, k, rule)
    here = slice(m.q, m.q + m.rows)
    mass = scores.logsumexp(-1).flatten(0, 1)
    before = lse[:, here]
    whole = torch.logaddexp(before, mass)
    safe = whole.masked_fill(whole == -inf, 0.0)  # a query that saw nothing yet
    chances = torch.exp(scores - safe.view(*scores.shape[:3], 1)).to(v.dtype)
    values = (chances @ v[:, None, m.k : m.k + m.keys]).flatten(0, 1)
    out[:, here] = out[:, here] * torch.exp(before - safe)[..., None] + values.to(out.dtype)
    lse[:, here] = whole


def _back(
    to_q: Tensor,
    sums: Sequence[Tensor],
    m: Meeting,
    given: tuple[Tensor, Tensor, Tensor],
    kept: tuple[Tensor, Tensor, Tensor],
    rule: Rule,
) -> None:
    """Adds what one block gives to the gradients of queries, and of visiting keys and values."""
    (q, k, v), (grad, delta, lse) = given, kept
    here, there = slice(m.q, m.q + m.rows), slice(m.k, m.k + m.keys)
    scores, slope = _scores(m, q, k, rule)
    shape = scores.shape[:3]
    chances = torch.exp(scores - lse[:, here].reshape(*shape, 1))
    slopes = grad[:, here].reshape(*shape, -1)
    sums[1][:, there] += (chances.to(v.dtype).transpose(2, 3) @ slopes).sum(1)
    to_chances = (slopes @ v[:, None, there].transpose(2, 3)).to(scores.dtype)
    to_scores = (chances * (to_chances - delta[:, here].reshape(*shape, 1)) * slope * rule.scale).to(q.dtype)
    to_q[:, here] += (to_scores @ k[:, None, there]).flatten(0, 1)
    queries = q[:, here].unflatten(0, (k.shape[0], -1))
    sums[0][:, there] += (to_scores.transpose(2, 3) @ queries).sum(1)
