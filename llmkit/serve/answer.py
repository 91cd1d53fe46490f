"""The text of one answer as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.inference.request import Event, Token
from llmkit.inference.text import Detokeniser


@dataclass(frozen=True)
class Piece:
    """What an event adds to an answer."""

    text: str
    """What can be shown."""
    tokens: tuple[Token, ...]
    """Those that are part of the answer: what ends it is none."""
    finish: str | None


class Answer:
    """One answer; what could be the beginning of a stop text is held back until it is known."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.words, self.stops = Detokeniser(tokenizer), tuple(stops)
        self.held = ""
        self.made = 0
        """Tokens, with the one that ended it."""

    def take(self, event: Event) -> Piece:
        """What an event of this answer adds."""
        self.made += len(event.tokens)
        tokens = event.tokens
        if event.finish == "stop" and not isinstance(event.stopped, str):
            tokens = tokens[:-1]
        text = self.held + "".join(self.words.add(token.id) for token in tokens)
        if event.finish is not None:
            text += self.words.rest()
            if isinstance(event.stopped, str):
                text = text[: text.find(event.stopped)] if event.stopped in text else text
            self.held = ""
        else:
            keep = max((_overlap(text, stop) for stop in self.stops), default=0)
            self.held, text = (text[-keep:], text[:-keep]) if keep else ("", text)
        return Piece(text, tokens, event.finish)


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if stop.startswith(text[-size:])), 0)
