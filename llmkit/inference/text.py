"""From tokens to text as they come: what can be shown is given at once, half a letter waits for its other half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"


class Detokeniser:
    """The text of tokens that come one by one; all that it gave, put together, is the decoding of them all."""

    def __init__(self, tokenizer: Any, special: bool = False) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.ids: list[int] = []
        self.read = self.given = 0
        """Of `ids`: where the part begins that is decoded again with each token, and up to where its text is given."""

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        self.ids.append(token)
        before, now = self._text(self.ids[self.read : self.given]), self._text(self.ids[self.read :])
        if now.endswith(BROKEN) or len(now) <= len(before):
            return ""
        self.read, self.given = self.given, len(self.ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What was held back, at the end."""
        before, now = self._text(self.ids[self.read : self.given]), self._text(self.ids[self.read :])
        self.read, self.given = self.given, len(self.ids)
        return now[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not self.special)
        return text


class Stops:
    """Looks for stop texts in what is made, also across the borders of tokens."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.words, self.texts = Detokeniser(tokenizer), tuple(texts)
        self.tail = ""

    def after(self, token: int) -> str | None:
        """The text that this token completed, if it did: of several the one that begins first."""
        self.tail += self.words.add(token)
        found = [(at, text) for text in self.texts if (at := self.tail.find(text)) >= 0]
        longest = max(map(len, self.texts))
        self.tail = self.tail[-(longest - 1) :] if longest > 1 else ""
        return min(found)[1] if found else None


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the first stop text in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
