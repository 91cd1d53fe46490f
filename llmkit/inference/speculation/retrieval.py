"""Drafts from a corpus and from the text itself, by whichever has the longer end of it (as SAM decoding does,
arXiv:2411.10666)."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from llmkit.inference.speculation.corpus import DEEP, Corpus
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.ngram import LENGTHS, Lookup

SHARES = (0.5, 0.9)
"""Shares of the places that go on alike at which the class of sureness rises."""


class Retrieval:
    """A `Drafter` over a corpus and what a sequence itself has said."""

    free = True

    def __init__(self, corpus: Corpus, own: Lookup) -> None:
        self.corpus, self.own = corpus, own
        self.classes = own.classes + len(LENGTHS) * (len(SHARES) + 1)
        """Those of the text itself first: how often a corpus is right is another thing."""

    def read(self, asks: Seq[Ask]) -> None:
        """What they have said themselves."""
        self.own.read(asks)

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        drafted = zip(asks, self.own.draft(asks), strict=True)
        return [self._better(ask, draft) for ask, draft in drafted]

    def _better(self, ask: Ask, own: Draft) -> Draft:
        one = ask.sequence
        length = self.own.longest(one)
        if not ask.count or length >= DEEP:
            return own
        found = self.corpus.follows(one.tokens[-DEEP:], ask.count, max(self.own.least, length + 1))
        known = next((at for at, token in enumerate(found.tokens) if token >= self.own.words), len(found.tokens))
        if not known:
            return own
        sureness = [self._class(found.length + at, found.shares[at]) for at in range(known)]
        return Draft(found.tokens[:known], sureness)

    def _class(self, length: int, share: float) -> int:
        agreed = sum(share >= one for one in SHARES)
        longer = sum(length >= one for one in LENGTHS) - 1
        return self.own.classes + longer * (len(SHARES) + 1) + agreed
