"""Trees of drafts: which of them are worth a place in a step, and in what order they lie there."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from llmkit.inference.paths import depths, widest
from llmkit.inference.speculation.drafter import Draft
from llmkit.inference.speculation.most import MOST


@dataclass
class Tree:
    """Drafts, and of each that it and all before it are right: less than of the one that it follows."""

    draft: Draft = field(default_factory=Draft)
    chances: list[float] = field(default_factory=list)


def depth(draft: Draft) -> int:
    """Of its longest path."""
    return 1 + max(depths(draft.parents)) if draft.parents else len(draft.tokens)


def check(draft: Draft, classes: int, words: int | None) -> None:
    """Whether it is what a drafter may say: tokens of a vocabulary of `words`, each with its class, that follow earlier
    ones.

    Raises:
        ValueError: it is not.
    """
    if wrong := [token for token in draft.tokens if token < 0 or (words is not None and token >= words)]:
        raise ValueError(f"a draft of token {wrong[0]} is none of a vocabulary of {words}")
    if len(draft.sureness) != len(draft.tokens) or not all(0 <= one < classes for one in draft.sureness):
        raise ValueError(f"{len(draft.tokens)} drafts are not each of one of {classes} classes")
    if not draft.parents:
        return
    if len(draft.parents) != len(draft.tokens) or not all(-1 <= one < at for at, one in enumerate(draft.parents)):
        raise ValueError(f"{len(draft.tokens)} drafts do not each follow an earlier one")
    if len({*zip(draft.parents, draft.tokens, strict=True)}) < len(draft.tokens):
        raise ValueError("two drafts that follow one token are the same")


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


def first(tree: Tree, count: int) -> Tree:
    """Those `count` of a chain, or of a tree that lies by its chances, that lie first."""
    draft = tree.draft
    return Tree(Draft(draft.tokens[:count], draft.sureness[:count], draft.parents[:count]), tree.chances[:count])


def laid(tree: Tree) -> Draft:
    """The path of which the most is to be expected first, so that what comes of it need not be moved."""
    draft = tree.draft
    if not draft.parents:
        return draft
    path = widest(draft.parents, tree.chances)
    on = set(path)
    made = _ordered(draft, path + [at for at in range(len(draft.tokens)) if at not in on])
    return Draft(made.tokens, made.sureness) if len(path) == len(draft.tokens) else made


def likeliest(tree: Tree) -> Tree:
    """The path of which the most is to be expected, as a chain."""
    if not tree.draft.parents:
        return tree
    path = widest(tree.draft.parents, tree.chances)
    made = _ordered(tree.draft, path)
    return Tree(Draft(made.tokens, made.sureness), [tree.chances[at] for at in path])


def _parents(draft: Draft) -> list[int]:
    return draft.parents or list(range(-1, len(draft.tokens) - 1))


def _ordered(draft: Draft, order: Seq[int]) -> Draft:
    places = {-1: -1} | {at: place for place, at in enumerate(order)}
    parents = [places[draft.parents[at]] for at in order]
    return Draft([draft.tokens[at] for at in order], [draft.sureness[at] for at in order], parents)
