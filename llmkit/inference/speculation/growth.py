"""Drafts in the making: which words follow, level by level, and where the rows of each path lie in the cache.

Of each path the next draft is what the place would choose of the head's law: the likeliest word, or the one that the
number of the place draws (Daliri, Musco and Suresh, arXiv:2408.07978); beside it the likeliest others. The paths of the
largest products of probabilities are drafted on, as in EAGLE-2 (arXiv:2406.16858).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmkit.inference.request import RequestError
from llmkit.inference.sampler import choose, uniform
from llmkit.inference.shortlist import draws
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.most import MOST
from llmkit.inference.steer import Steer

EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
"""Probabilities at which the class of sureness rises."""
LIKELIEST, DRAWN, BESIDE = range(3)
"""What a draft is: how often one of a probability is right is another matter for each."""
CLASSES = 3 * (len(EDGES) + 1)


@dataclass(frozen=True)
class Word:
    """A word that may follow a path."""

    token: int
    share: float
    """Its probability."""
    kind: int

    @property
    def sureness(self) -> int:
        """Its class."""
        return self.kind * (len(EDGES) + 1) + bisect_right(EDGES, self.share)

    @property
    def weight(self) -> float:
        """What it leaves of its path's probability; two draws by one number are equal more often than that."""
        return self.share**0.5 if self.kind == DRAWN else self.share


@dataclass(frozen=True)
class Tip:
    """The end of a path."""

    token: int = -1
    node: int = -1
    """Which draft it is; -1: the newest token of the text."""
    depth: int = 0
    chance: float = 1.0
    branch: int = 0
    """Whose blocks its rows lie in."""


@dataclass(eq=False)
class Growth:
    """The drafts of one sequence."""

    ask: Ask
    width: int
    floor: float
    whole: tuple[int, ...]
    """Blocks that all paths share."""
    fill: int
    """Rows of the text after those."""
    tails: list[list[int]]
    """Of each branch the blocks of these rows and of its drafts; the first is the sequence's own."""
    steer: Steer | None = None
    """Along the only path, where what is allowed depends on it; else the place's own is asked."""
    made: Draft = field(default_factory=Draft)
    chances: list[float] = field(default_factory=list)
    """Of each draft that all of its path is right, by the head's own probabilities."""
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """Branch, a new one beside it, and how many rows that is to have."""

    def __post_init__(self) -> None:
        steer = self.ask.steer
        if not (steer.plain or steer.rules.processors):  # whose own functions are asked nothing that may not come
            self.steer, self.width = steer.fork(steer.index), 1

    @property
    def sampling_temperature(self) -> float:
        """0: the likeliest word is asked for, or nobody knows what is."""
        return 0.0 if self.ask.steer.rules.processors else self.ask.steer.rules.sampling.temperature

    def blocks(self, branch: int) -> tuple[int, ...]:
        """Of a path."""
        return (*self.whole, *self.tails[branch])

    def moves(self, size: int) -> list[tuple[int, int]]:
        """Slots to copy, from and to, before the new tips are read."""
        made = [
            (self.tails[source][at // size] * size + at % size, self.tails[target][at // size] * size + at % size)
            for source, target, rows in self.copies
            for at in range(rows)
        ]
        self.copies = []
        return made

    def take(self, words: Seq[tuple[int, Tip, list[Word]]]) -> list[tuple[Tip, int]]:
        """Drafts words after tips (of a row each); the tips that are drafted on, and of which row."""
        found = [(tip.chance * word.weight, row, tip, word) for row, tip, after in words for word in after]
        found.sort(key=lambda one: -one[0])
        going: list[tuple[Tip, int]] = []
        kept: set[int] = set()
        for chance, row, tip, word in found[: 2 * self.width if self.width > 1 else 1]:
            if len(self.made.tokens) == MOST:
                break
            node, depth = len(self.made.tokens), tip.depth + 1
            self.made.tokens.append(word.token)
            self.made.sureness.append(word.sureness)
            self.chances.append(chance)
            if self.width > 1:
                self.made.parents.append(tip.node)
            ends = word.token in self.ask.steer.rules.ends
            if depth < self.ask.count and chance >= self.floor and not ends and len(going) < len(self.tails):
                going.append((Tip(word.token, node, depth, chance, tip.branch), row))
                kept.add(tip.branch)
        return self._branched(going, kept)

    def best(self) -> Draft:
        """The likeliest drafts, as many as are asked for: each is less likely than what it follows."""
        count, made = self.ask.nodes, self.made
        if len(made.tokens) <= count:
            return made
        kept = sorted(sorted(range(len(made.tokens)), key=lambda at: -self.chances[at])[:count])
        places = {-1: -1} | {at: place for place, at in enumerate(kept)}
        parents = [places[made.parents[at]] for at in kept] if made.parents else []
        return Draft([made.tokens[at] for at in kept], [made.sureness[at] for at in kept], parents)

    def _branched(self, going: list[tuple[Tip, int]], kept: set[int]) -> list[tuple[Tip, int]]:
        """The first that goes on from a path keeps its blocks; the others have copies."""
        free = [branch for branch in range(len(self.tails)) if branch not in kept]
        made: list[tuple[Tip, int]] = []
        for tip, row in going:
            branch = tip.branch
            if branch in kept:
                kept.discard(branch)
            else:
                branch = free.pop()
                self.copies.append((tip.branch, branch, self.fill + tip.depth - 1))
            made.append((Tip(tip.token, tip.node, tip.depth, tip.chance, branch), row))
        return made


Tips = list[tuple[Growth, Tip]]


def next_tips(tips: Tips, logits: Tensor, ids: Seq[int], words: int) -> tuple[Tips, list[int]]:
    """Drafts what follows each tip by the head's logits (N, V), whose words `ids` are; then the tips that are drafted
    on, and of which row each comes."""
    laws = _tempered(tips, logits)
    norms = laws.logsumexp(1)
    count = max(one.width for one, _ in tips)
    best = laws.topk(min(count + 1 if count > 1 else 1, laws.shape[1]))
    shares, places = (best.values - norms[:, None]).exp().tolist(), best.indices.tolist()
    first = _chosen(tips, logits, laws, norms, ids, words)
    after: dict[Growth, list[tuple[int, Tip, list[Word]]]] = {}
    for row, (one, tip) in enumerate(tips):
        main = first[row] if row in first else Word(ids[places[row][0]], shares[row][0], LIKELIEST)
        if main is None:
            continue
        beside = [
            Word(ids[place], share, BESIDE)
            for place, share in zip(places[row], shares[row], strict=True)
            if ids[place] != main.token and share * tip.chance >= one.floor
        ]
        after.setdefault(one, []).append((row, tip, [main, *beside[: one.width if one.width > 1 else 0]]))
        if one.steer is not None and main.token not in one.ask.steer.rules.ends:
            one.steer.take(main.token)
    going = [(one, tip, row) for one, found in after.items() for tip, row in one.take(found)]
    return [(one, tip) for one, tip, _ in going], [row for _, _, row in going]


def _tempered(tips: Tips, logits: Tensor) -> Tensor:
    sharp = [1 / one.sampling_temperature if one.sampling_temperature > 0 else 1.0 for one, _ in tips]
    return logits if all(by == 1 for by in sharp) else logits * torch.tensor(sharp)[:, None].clamp(1e-30, 1e30)


def _chosen(
    tips: Tips, logits: Tensor, laws: Tensor, norms: Tensor, ids: Seq[int], words: int
) -> dict[int, Word | None]:
    """By row what a place chooses that does not choose the likeliest word; None where it chooses nothing."""
    made: dict[int, Word | None] = {row: None for row, sound in enumerate(norms.isfinite().tolist()) if not sound}
    left = [(row, one) for row, (one, _) in enumerate(tips) if row not in made]
    drawn = [row for row, one in left if one.steer is None and one.sampling_temperature > 0]
    rows = logits.numpy()
    asked = []
    for row in drawn:
        steer, depth = tips[row][0].ask.steer, tips[row][1].depth
        sampling = steer.rules.sampling
        asked.append((rows[row], sampling, uniform(sampling.seed, steer.index, len(steer.made) + depth)))
    for row, (place, _) in zip(drawn, draws(asked), strict=True):
        made[row] = Word(ids[place], float((laws[row, place] - norms[row]).exp()), DRAWN)
    steered = [(row, one.steer) for row, one in left if one.steer is not None]
    whole = torch.full((len(steered), words), float("-inf"))
    if steered:
        whole[:, torch.tensor(ids)] = logits[torch.tensor([row for row, _ in steered])]
    for (row, steer), token in zip(steered, choose(list(whole), [steer for _, steer in steered]), strict=True):
        made[row] = None
        if not isinstance(token, RequestError):
            kind = DRAWN if steer.rules.sampling.temperature > 0 else LIKELIEST
            share = float((laws[row, bisect_left(ids, token.id)] - norms[row]).exp())
            made[row] = Word(token.id, share, kind)
    return made
