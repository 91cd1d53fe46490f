"""How often drafts are right: of each class of sureness, and of each sequence beside what its classes let expect."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from llmkit.inference.paths import following
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.drafter import Draft

FORGET = 0.995
"""What a class keeps of its counts with each new one, so that what was long ago counts less."""
FORGET_ALL = 0.999
"""The same of places, over all classes."""
OWN_FORGET = 0.95
PRIOR = 2.0
"""Drafts that a class is taken to have seen, half of them right, before any."""
OWN_PRIOR = 2.0
"""The weight of the classes beside what a sequence itself has shown."""


@dataclass
class Counted:
    """Of one sequence."""

    right: float = 0.0
    expected: float = 0.0
    at: int = 0
    """Tokens that it had when it was drafted for."""
    draft: Draft = field(default_factory=Draft)


class Rates:
    """Learned from what came, whether a draft was looked at or not."""

    def __init__(self, classes: int) -> None:
        self.right = [PRIOR * 0.5] * classes
        self.tried = [PRIOR] * classes
        self.deep, self.places = PRIOR * 0.5 * classes, PRIOR * classes
        """Places at which one of the drafts was right, and all that were drafted for."""
        self.own: WeakKeyDictionary[Sequence, Counted] = WeakKeyDictionary()

    def of(self, sureness: int) -> float:
        """How often a draft of a class is right."""
        return self.right[sureness] / self.tried[sureness]

    def chances(self, one: Sequence, draft: Draft) -> list[float]:
        """Of each draft, that it and all before it are right."""
        own = self.own.get(one, Counted())
        factor = (own.right + OWN_PRIOR) / (own.expected + OWN_PRIOR)
        made, chance = list[float](), 1.0
        for at, each in enumerate(draft.sureness):
            if draft.parents:
                chance = made[draft.parents[at]] if draft.parents[at] >= 0 else 1.0
            chance *= min(0.99, self.of(each) * factor)
            made.append(chance)
        return made

    def ahead(self, one: Sequence, count: int) -> list[float]:
        """The same of drafts that are not made yet, by the rate of all classes."""
        own = self.own.get(one, Counted())
        factor = (own.right + OWN_PRIOR) / (own.expected + OWN_PRIOR)
        rate = min(0.99, self.deep / self.places * factor)
        return [rate ** (at + 1) for at in range(count)]

    def note(self, one: Sequence, draft: Draft) -> None:
        """What was drafted now."""
        own = self.own.setdefault(one, Counted())
        own.at, own.draft = len(one.tokens), draft

    def learn(self, one: Sequence) -> None:
        """Looks at what came in the place of the drafts that were noted."""
        own = self.own.get(one)
        if own is None:
            return
        draft, own.draft = own.draft, Draft()
        at = -1
        for token in one.tokens[own.at :]:
            follow = following(len(draft.tokens), draft.parents, at)
            if not follow:
                break
            own.right, own.expected = own.right * OWN_FORGET, own.expected * OWN_FORGET
            for each in follow:
                self._count(own, draft.sureness[each], float(draft.tokens[each] == token))
            same = [each for each in follow if draft.tokens[each] == token]
            self.deep, self.places = self.deep * FORGET_ALL + bool(same), self.places * FORGET_ALL + 1
            if not same:
                break
            at = same[0]

    def _count(self, own: Counted, sureness: int, right: float) -> None:
        own.right += right
        own.expected += self.of(sureness)
        self.right[sureness] = self.right[sureness] * FORGET + right
        self.tried[sureness] = self.tried[sureness] * FORGET + 1
