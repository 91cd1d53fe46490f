"""The `speculation` union: who drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config, setting

if TYPE_CHECKING:
    from llmkit.inference.speculation.drafter import Drafter


@config
class Ngram:
    """What came after the longest end of the text that is in it already: for summaries, quotes, code and edits."""

    kind: Literal["ngram"] = "ngram"
    tokens: int = setting(default=12, least=1, most=63)
    """Drafts of an answer in one step, at most; how many there are is measured."""
    fixed: bool = False
    """Whether as many as there are up to `tokens` are always looked at, whatever they cost."""
    least: int = setting(default=1, least=1)
    """Tokens of the shortest end that is looked for."""

    def drafter(self, words: int) -> Drafter:
        """One for a vocabulary of `words`."""
        from llmkit.inference.speculation.ngram import Lookup

        return Lookup(words, self.least)


Speculation = Ngram
