"""Drafts by looking back: what came after the longest suffix of a text that is in it already.

Prompt lookup (Saxena 2023, and LLMA, arXiv:2304.04487) by a suffix automaton (SAM decoding, arXiv:2411.10666), which
has no longest n-gram and takes constant time for each token.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.automaton import Automaton
from llmkit.inference.speculation.drafter import Ask, Draft

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Lengths of matches at which the class of sureness rises."""

BREAK = -1
"""Stands where one text ends and another begins."""


class Lookup:
    """A `Drafter` over what a sequence itself has said."""

    classes, free = len(LENGTHS), True

    def __init__(self, words: int, least: int = 1) -> None:
        """`words`: of the vocabulary; `least`: tokens of the shortest match that is gone by."""
        self.words, self.least = words, least
        self.texts: WeakKeyDictionary[Sequence, Automaton] = WeakKeyDictionary()

    def read(self, asks: Seq[Ask]) -> None:
        """All that was said so far: what takes long where it is a prompt."""
        for ask in asks:
            self._read(ask.sequence)

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        return [self._one(ask.sequence, ask.count) for ask in asks]

    def longest(self, one: Sequence) -> int:
        """Tokens of the longest end of a text that it has itself, so far as it was drafted for."""
        text = self.texts.get(one)
        return 0 if text is None else text.found.length

    def _one(self, one: Sequence, count: int) -> Draft:
        text = self._read(one)
        found = text.found
        if found.length < self.least:
            return Draft()
        tokens = text.follows(found, count)
        end = next((at for at, token in enumerate(tokens) if not 0 <= token < self.words), len(tokens))
        return Draft(tokens[:end], [_class(found.length + at) for at in range(end)])

    def _read(self, one: Sequence) -> Automaton:
        """All of a text so far; between its prompt and its answer stands what the answer was foretold to be."""
        text, foretold = self.texts.get(one), one.request.prediction
        if text is None:
            text = self.texts[one] = Automaton()
            if foretold:
                for token in (*one.tokens[: one.before + len(one.request.prompt)], BREAK, *foretold, BREAK):
                    text.add(token)
        beside = len(foretold) + 2 if foretold else 0
        for token in one.tokens[len(text.text) - beside :]:
            text.add(token)
        return text


def _class(length: int) -> int:
    return sum(length >= one for one in LENGTHS) - 1
