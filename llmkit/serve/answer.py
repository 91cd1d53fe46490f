"""The text of one answer as its tokens come."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.inference.request import Event, Token
from llmkit.inference.text import Stream


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

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def take(self, event: Event) -> Piece:
        """What an event of this answer adds."""
        tokens = event.tokens
        if event.finish == "stop" and not isinstance(event.stopped, str):
            tokens = tokens[:-1]
        text = "".join(self.stream.add(token.id) for token in tokens)
        if event.finish is not None:
            text += self.stream.end()
        return Piece(text, tokens, event.finish)
