"""An answer as it grows, in pieces of text that can be shown."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.inference.request import Event, Finish, Token
from llmkit.inference.sampling import Sampling
from llmkit.inference.text import Stream, Texts


@dataclass(frozen=True)
class Piece:
    """What came of one answer; all texts put together are the answer's."""

    texts: tuple[str, ...]
    """What can be shown with each of `tokens`."""
    tokens: tuple[Token, ...] = ()
    """Those that are part of the answer: what ends it is none."""
    finish_reason: Finish | None = None
    """With the last piece."""
    index: int = 0
    """Which of the n answers."""
    stop_reason: int | str | None = None
    why: str = ""
    """Of an error: what it was."""
    rest: str = ""
    """What was held back until the end."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts) + self.rest


class Answer:
    """One answer; what could be the beginning of a stop text is held back until it is known."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def take(self, event: Event) -> Piece:
        """What an event of this answer adds."""
        said = event.said
        texts = tuple(self.stream.add(token.id) for token in said)
        rest = self.stream.end() if event.finish is not None else ""
        return Piece(texts, said, event.finish, event.index, event.stopped, event.why, rest)


class Pieces:
    """The pieces of what `sampling` asks for."""

    def __init__(self, sampling: Sampling, texts: Texts) -> None:
        self.answers = [Answer(texts.stream(sampling)) for _ in range(sampling.n)]
        self.open = set(range(sampling.n))

    @property
    def done(self) -> bool:
        """Whether all answers have ended."""
        return not self.open

    def take(self, event: Event) -> Piece:
        """What an event adds."""
        if event.finish is not None:
            self.open.discard(event.index)
        return self.answers[event.index].take(event)
