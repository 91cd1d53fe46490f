"""From the examples of one step to micro-batches: packed, shifted, with the context that keeps them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from llmkit.core.errors import DataError
from llmkit.core.types import Batch, Packed, Segment
from llmkit.data.grouped import idle, padded, shared, unshared
from llmkit.data.groups import Groups
from llmkit.data.node import NoPacking, Packing
from llmkit.data.prepare import Prepared


def micro_batches(
    prepared: Prepared,
    ids: Sequence[int],
    packing: Packing,
    capacity: int,
    rows: int,
    contexts: bool,
    device: str,
    rank: int = 0,
    world: int = 1,
    trees: bool = False,
) -> list[Batch]:
    """The micro-batches of one step, `rows` packed rows each: those that `rank` of `world` ranks is dealt.

    Packed rows of a micro-batch lie end to end in one row without padding: segments keep them apart. Without packing
    each example has a row of its own, padded on the right; `contexts` says whether the model takes one there too.
    Of groups, `trees` says whether the model takes a prompt once for all its completions. The plan is that of the whole
    step. Every rank gets equally many micro-batches: one that has less left runs the
    first once more, with weight 0.
    """
    make, length = _layout(prepared, isinstance(packing, NoPacking), contexts, trees)
    packed = packing.pack([length(i) for i in ids], capacity)
    groups = [packed[at : at + rows] for at in range(0, len(packed), rows)]
    turns = -(-len(groups) // world)
    dealt = [groups[at] if at < len(groups) else groups[0] for at in range(rank, turns * world, world)]
    made = [make(prepared, [ids[i] for row in group for i in row], device=device) for group in dealt]
    if rank + (turns - 1) * world >= len(groups):
        made[-1] = idle(made[-1])
    return made


def _layout(
    prepared: Prepared, plain: bool, contexts: bool, trees: bool
) -> tuple[Callable[..., Batch], Callable[[int], int]]:
    """What lays examples out, and how many tokens one takes so."""
    if not isinstance(prepared, Groups):
        return partial(_padded, contexts=contexts) if plain else _flat, prepared.length
    if plain:
        return partial(padded, contexts=contexts), prepared.spread
    return (shared, prepared.length) if trees else (unshared, prepared.spread)


def _flat(prepared: Prepared, ids: Sequence[int], device: str) -> Batch:
    parts = [prepared.sample(i) for i in ids]
    begins = np.cumsum([0, *(len(part[0]) for part in parts)]).tolist()
    places = [(begin + a, begin + b) for i, begin in zip(ids, begins, strict=False) for a, b in prepared.segments(i)]
    segments = tuple(Segment(0, start, end) for start, end in places)
    tokens, labels, weights = (np.concatenate(column)[None] for column in zip(*parts, strict=True))
    positions = np.concatenate([np.arange(end - start) for start, end in places])[None]
    return _batch(tokens, positions, labels, weights, Packed(segments), tuple(ids), (), device)


def _padded(prepared: Prepared, ids: Sequence[int], device: str, contexts: bool) -> Batch:
    parts = [prepared.sample(i) for i in ids]
    lengths = tuple(len(part[0]) for part in parts)
    width = max(lengths)
    columns = [np.stack([np.pad(part[c], (0, width - len(part[c]))) for part in parts]) for c in range(3)]
    # positions of padding begin again: a sequence is told by its run of positions (models/rotary.py)
    positions = np.zeros((len(parts), width), dtype=np.int64)
    segments = tuple(Segment(row, start, end) for row, i in enumerate(ids) for start, end in prepared.segments(i))
    if len(segments) > len(ids) and not contexts:
        raise DataError("the model cannot keep documents apart", fix="set documents=joined", key="documents")
    for segment in segments:
        positions[segment.row, segment.start : segment.end] = np.arange(segment.end - segment.start)
    context = Packed(segments) if contexts else None
    return _batch(columns[0], positions, columns[1], columns[2], context, tuple(ids), lengths, device)


def _batch(
    tokens: np.ndarray[Any, Any],
    positions: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    weights: np.ndarray[Any, Any],
    context: Packed | None,
    ids: tuple[int, ...],
    lengths: tuple[int, ...],
    device: str,
) -> Batch:
    first, second, third = (torch.from_numpy(a.astype(np.int64)).to(device) for a in (tokens, positions, labels))
    held = torch.from_numpy(weights.astype(np.float32)).to(device)
    return Batch(first, second, third, held, context, ids, lengths)
