"""Whether a judge is to be trusted: what it says twice, whether it goes by the place of an answer, or by its length.

Each figure is a share; the tests are sign tests, exact: of a judge without the bias both signs are equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.stats import binomtest

from llmkit.rl.judge import Say, Verdict, compared
from llmkit.rl.sample import Sample

SURE = 0.01
"""Below this chance of an unbiased judge, one is called biased."""
FILLER = (
    " To put the same in other words, and to be as complete as one can be here: what was said above is what there is to"
    " say about it, and it stands as it was said above, without anything that would have to be added or taken away."
)
"""Words that add nothing to any answer."""


@dataclass(frozen=True)
class Sign:
    """How often something was so, of the times that it could be."""

    so: int
    of: int

    @property
    def share(self) -> float:
        """0.5 where it never could be."""
        return self.so / self.of if self.of else 0.5

    @property
    def chance(self) -> float:
        """Of a share this far from one half, if both ways are equally likely."""
        return float(binomtest(self.so, self.of).pvalue) if self.of else 1.0

    @property
    def biased(self) -> bool:
        """Whether it is more than chance."""
        return self.chance < SURE


def agreement(verdicts: Sequence[Verdict]) -> float:
    """The share of pairs on which the judge says the same in both orders; those without a verdict count against it."""
    same = sum(v.in_order is not None and v.in_order == v.swapped for v in verdicts)
    return same / len(verdicts) if verdicts else 1.0


def unclear(verdicts: Sequence[Verdict]) -> float:
    """The share of pairs without a verdict."""
    return sum(v.worth is None for v in verdicts) / len(verdicts) if verdicts else 0.0


def place(verdicts: Sequence[Verdict]) -> Sign:
    """The swap test: of the pairs whose verdict changed with the order, how often the answer that stood first did
    better for it."""
    turned = [v.in_order - v.swapped for v in verdicts if v.in_order is not None and v.swapped is not None]
    return Sign(sum(change > 0 for change in turned), sum(change != 0 for change in turned))


def longer(verdicts: Sequence[Verdict]) -> Sign:
    """Of the pairs with a better one, how often that was the longer one. Longer answers may be better: `padded` asks of
    the length alone."""
    sides = [(v.worth - 0.5) * v.longer for v in verdicts if v.worth is not None]
    return Sign(sum(side > 0 for side in sides), sum(side != 0 for side in sides))


def padded(samples: Sequence[Sample], say: Say, rubric: str) -> Sign:
    """Asks of each answer against itself with words behind it that add nothing: how often the longer one is better, of
    the times that one of them is."""
    twice = [one for sample in samples for one in (sample, replace(sample, completion=sample.completion + FILLER))]
    pairs = [(at + 1, at, "") for at in range(0, len(twice), 2)]
    return longer(compared(twice, pairs, say, rubric))
