"""Batches of groups: a prompt once with its completions as branches (`Tree`), or once for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.core.types import Batch, Branches, Packed, Segment, Tree
from llmkit.data.groups import Groups, fed

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Stretch:
    """Tokens that lie together in a row: where in `ids` each is, where the one that it predicts is (-1: none), and the
    completion that this one is of."""

    seen: Array
    said: Array
    begin: int
    """Position of its first token."""
    of: int = -1
    parent: int = -1


def shared(groups: Groups, ids: Sequence[int], device: str) -> Batch:
    """These examples in one row (1, T), each with its prompt once.

    The prompt's stretch lacks its last token, with which each branch begins; a branch lacks its own last token, after
    which nothing is predicted.
    """
    laid: list[_Stretch] = []
    count = 0
    for index in ids:
        first, spans = int(groups.starts[index]), groups.completions(index)
        border, root = spans[0][0], -1
        if border - 1 > first:  # of a prompt of one token nothing is left to share
            root = len(laid)
            laid.append(_Stretch(np.arange(first, border - 1), np.full(border - 1 - first, -1), 0))
        for span in spans:
            laid.append(_Stretch(fed(border, *span), np.arange(*span), border - 1 - first, count, root))
            count += 1
    row = _row(groups, laid)
    segments = [Segment(0, a, b, one.parent) for (a, b), one in zip(_places(laid), laid, strict=True)]
    return _batch(groups, ids, [row], Tree(tuple(segments)), (), device)


def unshared(groups: Groups, ids: Sequence[int], device: str) -> Batch:
    """These examples in one row (1, T), each completion behind a prompt of its own."""
    laid = _alone(groups, ids)
    segments = tuple(Segment(0, a, b) for a, b in _places(laid))
    return _batch(groups, ids, [_row(groups, laid)], Packed(segments), (), device)


def padded(groups: Groups, ids: Sequence[int], device: str, contexts: bool) -> Batch:
    """Each completion behind its prompt in a row of its own, (K, T), padded on the right."""
    laid = _alone(groups, ids)
    rows, lengths = [_row(groups, [one]) for one in laid], tuple(len(one.seen) for one in laid)
    whole = Packed(tuple(Segment(row, 0, length) for row, length in enumerate(lengths)))
    return _batch(groups, ids, rows, whole if contexts else None, lengths, device)


def idle(batch: Batch) -> Batch:
    """The same forward, of which nothing counts: for a rank that has no work left."""
    made = replace(batch, weights=torch.zeros_like(batch.weights))
    if batch.branches is None:
        return made
    none = batch.branches.of[:0]
    per, each = ({name: x[:0] for name, x in held.items()} for held in (batch.branches.per, batch.branches.each))
    return replace(made, branches=Branches(none, none, per, each))


def _alone(groups: Groups, ids: Sequence[int]) -> list[_Stretch]:
    laid: list[_Stretch] = []
    for index in ids:
        first, spans = int(groups.starts[index]), groups.completions(index)
        border = spans[0][0]
        before, nothing = np.arange(first, border - 1), np.full(border - 1 - first, -1)
        for begin, end in spans:
            seen = np.concatenate([before, fed(border, begin, end)])
            laid.append(_Stretch(seen, np.concatenate([nothing, np.arange(begin, end)]), 0, len(laid)))
    return laid


def _places(laid: Sequence[_Stretch]) -> list[tuple[int, int]]:
    edges = np.cumsum([0, *(len(one.seen) for one in laid)]).tolist()
    return list(pairwise(edges))


def _row(groups: Groups, laid: Sequence[_Stretch]) -> tuple[Array, ...]:
    """Of a row where its tokens lie, where their labels do, positions and completions, (T,) each."""
    positions = np.concatenate([one.begin + np.arange(len(one.seen)) for one in laid])
    owners = np.concatenate([np.full(len(one.seen), one.of) for one in laid])
    return np.concatenate([one.seen for one in laid]), np.concatenate([one.said for one in laid]), positions, owners


def _batch(
    groups: Groups,
    ids: Sequence[int],
    rows: Sequence[tuple[Array, ...]],
    context: Tree | Packed | None,
    lengths: tuple[int, ...],
    device: str,
) -> Batch:
    wide = max(len(row[0]) for row in rows)
    fill = (int(groups.starts[ids[0]]), -1, 0, -1)  # any token stands for padding
    seen, said, positions, owners = (
        np.stack([np.pad(row[c], (0, wide - len(row[c])), constant_values=fill[c]) for row in rows]) for c in range(4)
    )
    tokens, weights = np.asarray(groups.ids), np.asarray(groups.weights)
    weights = np.where(said < 0, 0, weights[said])
    chosen = weights != 0
    each = {name: _held(held[said[chosen]], device) for name, held in groups.each.items()}
    whose = [range(int(groups.firsts[i]), int(groups.firsts[i + 1])) for i in ids]
    places = np.array([place for own in whose for place in own])
    group = np.repeat(np.arange(len(ids)), [len(own) for own in whose])
    per = {name: _held(held[places], device) for name, held in groups.per.items()}
    return Batch(
        _whole(tokens[seen], device),
        _whole(positions, device),
        _whole(np.where(said < 0, 0, tokens[said]), device),
        _held(weights, device),
        context,
        tuple(ids),
        lengths,
        Branches(_whole(owners[chosen], device), _whole(group, device), per, each),
    )


def _whole(values: Array, device: str) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _held(values: Array, device: str) -> Tensor:
    """Figures; whole numbers stay those, to the last."""
    if values.dtype.kind == "i":
        return _whole(values, device)
    return torch.from_numpy(values.astype(np.float32)).to(device)
