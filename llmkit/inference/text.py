"""Text as it is made: what can be shown is given at once, what may be half a letter or half a stop text waits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from threading import Lock
from typing import Any

from llmkit.inference.detokenise import Detokeniser, detokeniser
from llmkit.inference.grammar import Grammar
from llmkit.inference.grammars import Grammars
from llmkit.inference.matching import Match
from llmkit.inference.request import RequestError
from llmkit.inference.sampling import Sampling


class Texts:
    """A tokenizer as the engine and those who show its answers need it."""

    def __init__(self, tokenizer: Any, special: bool | Collection[str] = False) -> None:
        """`special`: whether special tokens have text, or which of them do."""
        self.tokenizer = tokenizer
        self.made = detokeniser(tokenizer, special)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.marks: dict[str, int] = {str(token): id for id, token in added.items() if token.special}
        """Special tokens by their text."""
        self.grammars: Grammars | None = None
        self.lock = Lock()

    def stream(self, sampling: Sampling) -> Stream:
        """What shows one answer as it grows."""
        marks = {self.marks[stop]: stop for stop in sampling.stop if stop in self.marks}
        return Stream(self.made(), sampling.stop, sampling.min_tokens, marks)

    def whole(self, tokens: Sequence[int], sampling: Sampling) -> str:
        """The text of an answer, up to what stopped it."""
        stream = self.stream(sampling)
        return "".join([*map(stream.add, tokens), stream.end()])

    def matcher(self, grammar: Grammar, words: int, ends: Sequence[int]) -> Match:
        """A grammar's state before the first token; `words`: rows of the model's vocabulary, `ends`: what ends a text.

        The first of a grammar takes up to some seconds. Where nobody may wait for it, it is asked for in another thread
        before the request is added; it is kept.

        Raises:
            RequestError: the grammar cannot be enforced.
        """
        with self.lock:
            if self.grammars is None:
                self.grammars = Grammars(self.tokenizer, words, ends)
        return self.grammars.matcher(grammar)

    def bad(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The sequences of tokens that make any of the words, with and without a space before it.

        Raises:
            RequestError: a word has no tokens.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            own = [one for one in (self._ids(word), self._ids(" " + word.lstrip()), self._inside(word)) if one]
            if not own:
                raise RequestError(f"{word!r} has no tokens", fix="leave it out", key="bad_words")
            found |= dict.fromkeys(own)
        return tuple(found)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _inside(self, word: str) -> tuple[int, ...]:
        """As it stands after other text, where a tokenizer puts a space before all text."""
        before, both = self._ids("\n"), self._ids("\n" + word)
        return both[len(before) :] if both[: len(before)] == before else ()


class Stream:
    """The text of one answer, token by token, never any of the text that stops it.

    Of several stop texts the one that is complete first wins; of those that end at one letter, the longest.
    """

    def __init__(
        self, words: Detokeniser, stops: Sequence[str] = (), least: int = 0, marks: Mapping[int, str] | None = None
    ) -> None:
        """Nothing stops it before `least` tokens; `marks`: tokens that are stop texts by themselves."""
        self.words, self.least, self.marks = words, least, marks or {}
        self.watches = [Watch(stop) for stop in stops]
        self.count, self.held = 0, ""
        self.stopped: str | None = None
        """The stop text that ended it."""

    def add(self, token: int) -> str:
        """The text that can be shown with this token."""
        if self.stopped is not None:
            return ""
        self.count += 1
        if token in self.marks and self.count >= self.least:
            shown = self.end()
            self.stopped = self.stopped or self.marks[token]
            return shown
        return self._shown(self.words.add(token))

    def end(self) -> str:
        """What was held back: no more tokens come."""
        shown = "" if self.stopped is not None else self._shown(self.words.rest())
        held, self.held = self.held, ""
        return shown if self.stopped is not None else shown + held

    def _shown(self, new: str) -> str:
        if not self.watches:
            return new
        text, before = self.held + new, len(self.held)
        for at, letter in enumerate(new, before + 1):
            complete = [watch.text for watch in self.watches if watch.step(letter)]
            if complete and self.count >= self.least:
                self.stopped = max(complete, key=len)
                return text[: at - len(self.stopped)]
        kept = len(text) - max(watch.state for watch in self.watches)
        self.held = text[kept:]
        return text[:kept]


class Watch:
    """Looks for a text in letters that come one by one, in linear time (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.state = text, 0
        """`state`: letters of the text that the last ones agree with."""
        self.shorter = [0]
        """For each beginning of the text, the longest one that it ends with."""
        for letter in text[1:]:
            self.shorter.append(self._next(self.shorter[-1], letter))

    def _next(self, state: int, letter: str) -> int:
        while state and self.text[state] != letter:
            state = self.shorter[state - 1]
        return state + (self.text[state] == letter)

    def step(self, letter: str) -> bool:
        """Whether the text is complete with this letter."""
        self.state = self._next(self.state, letter)
        if self.state < len(self.text):
            return False
        self.state = self.shorter[-1]
        return True
