"""Trees of drafts: which of them are worth a place in a step, and in what order they lie there."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from llmkit.inference.speculation.drafter import Draft
from llmkit.inference.speculation.most import MOST


def following(draft: Draft, last: int) -> list[int]:
    """Those that follow one draft, or for -1 the newest token."""
    if not draft.parents:
        return [last + 1] if last + 1 < len(draft.tokens) else []
    return [at for at in range(last + 1, len(draft.parents)) if draft.parents[at] == last]


def by_chance(draft: Draft, chances: Seq[float]) -> Draft:
    """The likeliest first, `MOST` at most: so many as are wanted from the beginning are a tree. `chances`: of each that
    it and all before it are right, less than those of the one that it follows."""
    return _ordered(draft, sorted(range(len(chances)), key=lambda at: -chances[at])[:MOST])


def taken(draft: Draft, count: int) -> Draft:
    """The first `count` of those that lie by their chances: the likeliest path first, so that it need not be moved."""
    path = _path(draft.parents[:count])
    on = set(path)
    made = _ordered(draft, path + [at for at in range(count) if at not in on])
    return Draft(made.tokens, made.sureness) if len(path) == count else made


def likeliest(draft: Draft, chances: Seq[float]) -> Draft:
    """The path that lets the most drafts expect to be right, as a chain."""
    worth: list[float] = []
    for chance, parent in zip(chances, draft.parents, strict=True):
        worth.append(chance + (worth[parent] if parent >= 0 else 0.0))
    at, path = max(range(len(worth)), key=worth.__getitem__), list[int]()
    while at >= 0:
        path.insert(0, at)
        at = draft.parents[at]
    return Draft([draft.tokens[at] for at in path], [draft.sureness[at] for at in path])


def _path(parents: Seq[int]) -> list[int]:
    """From each the first that follows it, from the beginning on."""
    path, last = [], -1
    for at, parent in enumerate(parents):
        if parent == last:
            path.append(at)
            last = at
    return path


def _ordered(draft: Draft, order: Seq[int]) -> Draft:
    places = {-1: -1} | {at: place for place, at in enumerate(order)}
    parents = [places[draft.parents[at]] for at in order]
    return Draft([draft.tokens[at] for at in order], [draft.sureness[at] for at in order], parents)
