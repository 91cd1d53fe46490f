"""Trees of drafts: which of them are worth a place in a step, and in what order they lie there."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from llmkit.inference.speculation.drafter import Draft
from llmkit.inference.speculation.most import MOST


@dataclass
class Tree:
    """Drafts, and of each that it and all before it are right: less than of the one that it follows."""

    draft: Draft = field(default_factory=Draft)
    chances: list[float] = field(default_factory=list)


def following(draft: Draft, last: int) -> list[int]:
    """Those that follow one draft, or for -1 the newest token."""
    if not draft.parents:
        return [last + 1] if last + 1 < len(draft.tokens) else []
    return [at for at in range(last + 1, len(draft.parents)) if draft.parents[at] == last]


def depth(draft: Draft) -> int:
    """Of its longest path."""
    if not draft.parents:
        return len(draft.tokens)
    made = list[int]()
    for parent in draft.parents:
        made.append(made[parent] + 1 if parent >= 0 else 1)
    return max(made)


def joined(one: Tree, other: Tree) -> Tree:
    """Two trees as one; what is in both is as likely as the likelier says."""
    if not one.chances or not other.chances:
        return one if one.chances else other
    draft, chances = Draft([*one.draft.tokens], [*one.draft.sureness], [*_parents(one.draft)]), [*one.chances]
    known = {key: at for at, key in enumerate(zip(draft.parents, draft.tokens, strict=True))}
    places = {-1: -1}
    rest = zip(other.draft.tokens, other.draft.sureness, _parents(other.draft), other.chances, strict=True)
    for each, (token, sureness, parent, chance) in enumerate(rest):
        key = places[parent], token
        at = places[each] = known.setdefault(key, len(draft.tokens))
        if at < len(draft.tokens):
            chances[at] = max(chances[at], chance)
            continue
        draft.tokens.append(token)
        draft.sureness.append(sureness)
        draft.parents.append(key[0])
        chances.append(chance)
    return Tree(draft, chances)


def ordered(tree: Tree) -> Tree:
    """The likeliest first, `MOST` at most: so many as are wanted from the beginning are a tree."""
    if not tree.draft.parents:
        return tree
    order = sorted(range(len(tree.chances)), key=lambda at: -tree.chances[at])[:MOST]
    return Tree(_ordered(tree.draft, order), [tree.chances[at] for at in order])


def taken(draft: Draft, count: int) -> Draft:
    """The first `count` of those that lie by their chances: the likeliest path first, so that it need not be moved."""
    if not draft.parents:
        return Draft(draft.tokens[:count], draft.sureness[:count])
    path = _path(draft.parents[:count])
    on = set(path)
    made = _ordered(draft, path + [at for at in range(count) if at not in on])
    return Draft(made.tokens, made.sureness) if len(path) == count else made


def likeliest(tree: Tree) -> Tree:
    """The path that lets the most drafts expect to be right, as a chain."""
    draft, chances = tree.draft, tree.chances
    if not draft.parents:
        return tree
    worth: list[float] = []
    for chance, parent in zip(chances, draft.parents, strict=True):
        worth.append(chance + (worth[parent] if parent >= 0 else 0.0))
    at, path = max(range(len(worth)), key=worth.__getitem__), list[int]()
    while at >= 0:
        path.insert(0, at)
        at = draft.parents[at]
    made = Draft([draft.tokens[at] for at in path], [draft.sureness[at] for at in path])
    return Tree(made, [chances[at] for at in path])


def _parents(draft: Draft) -> list[int]:
    return draft.parents or list(range(-1, len(draft.tokens) - 1))


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
