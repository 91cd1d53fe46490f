"""How often drafts are right: of each class of sureness, and of each sequence beside what its classes let expect."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from llmkit.inference.sequence import Sequence

FORGET = 0.995
"""What a class keeps of its counts with each new one, so that what was long ago counts less."""
OWN_FORGET = 0.9
PRIOR = 2.0
"""Drafts that a class is taken to have seen, half of them right, before any."""
OWN_PRIOR = 4.0
"""The weight of the classes beside what a sequence itself has shown."""


@dataclass
class Counted:
    """Of one sequence."""

    right: float = 0.0
    expected: float = 0.0
    at: int = 0
    """Tokens that it had when it was drafted for."""
    drafts: list[int] = field(default_factory=list)
    sureness: list[int] = field(default_factory=list)


class Rates:
    """Learned from what came, whether a draft was looked at or not."""

    def __init__(self, classes: int) -> None:
        self.right = [PRIOR * 0.5] * classes
        self.tried = [PRIOR] * classes
        self.own: WeakKeyDictionary[Sequence, Counted] = WeakKeyDictionary()

    def of(self, sureness: int) -> float:
        """How often a draft of a class is right."""
        return self.right[sureness] / self.tried[sureness]

    def chances(self, one: Sequence, sureness: list[int]) -> list[float]:
        """Of each draft, that it and all before it are right."""
        own = self.own.get(one, Counted())
        factor = (own.right + OWN_PRIOR) / (own.expected + OWN_PRIOR)
        made, chance = [], 1.0
        for each in sureness:
            chance *= min(0.99, self.of(each) * factor)
            made.append(chance)
        return made

    def ahead(self, one: Sequence, count: int) -> list[float]:
        """The same of drafts that are not made yet, by the rate of all classes."""
        own = self.own.get(one, Counted())
        factor = (own.right + OWN_PRIOR) / (own.expected + OWN_PRIOR)
        rate = min(0.99, sum(self.right) / sum(self.tried) * factor)
        return [rate ** (at + 1) for at in range(count)]

    def note(self, one: Sequence, drafts: list[int], sureness: list[int]) -> None:
        """What was drafted now."""
        own = self.own.setdefault(one, Counted())
        own.at, own.drafts, own.sureness = len(one.tokens), drafts, sureness

    def learn(self, one: Sequence) -> None:
        """Looks at what came in the place of the drafts that were noted."""
        own = self.own.get(one)
        if own is None:
            return
        came = one.tokens[own.at :]
        for draft, sureness, token in zip(own.drafts, own.sureness, came, strict=False):
            right = float(draft == token)
            own.right = own.right * OWN_FORGET + right
            own.expected = own.expected * OWN_FORGET + self.of(sureness)
            self.right[sureness] = self.right[sureness] * FORGET + right
            self.tried[sureness] = self.tried[sureness] * FORGET + 1
            if not right:
                break
        own.drafts = []
