"""Which draft follows which: `parents` has of each the earlier one that it follows, -1 for the newest token of the
text; where it is empty each follows the one before."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq


def following(count: int, parents: Seq[int], last: int) -> list[int]:
    """Those of `count` drafts that follow one of them, or for -1 the newest token."""
    ahead = range(last + 1, count)
    return [at for at in ahead if parents[at] == last] if parents else [*ahead[:1]]


def next_of(drafts: Seq[int], parents: Seq[int], last: int, token: int) -> int:
    """The draft of a token that follows another, -1 for none."""
    return next((at for at in following(len(drafts), parents, last) if drafts[at] == token), -1)


def depths(parents: Iterable[int]) -> list[int]:
    """Of each draft of a tree how many come before it."""
    made: list[int] = []
    for parent in parents:
        made.append(made[parent] + 1 if parent >= 0 else 0)
    return made


def widest(parents: Seq[int], chances: Seq[float]) -> list[int]:
    """The path of which the most is to be expected; `chances`: of each draft that it and all before it are right."""
    worth: list[float] = []
    for chance, parent in zip(chances, parents, strict=True):
        worth.append(chance + (worth[parent] if parent >= 0 else 0.0))
    at, path = max(range(len(worth)), key=worth.__getitem__, default=-1), list[int]()
    while at >= 0:
        path.insert(0, at)
        at = parents[at]
    return path
