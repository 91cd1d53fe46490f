"""An answer as it grows, in pieces of text that can be shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkit.inference.request import Event, Finish, Token
from llmkit.inference.sampling import Sampling
from llmkit.inference.text import Detokeniser


@dataclass(frozen=True)
class Piece:
    """What came of one answer; all texts put together are the answer's."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: Finish | None = None
    """With the last piece."""
    index: int = 0
    """Which of the n answers."""
    stop_reason: int | str | None = None


class Pieces:
    """The pieces of what `sampling` asks for."""

    def __init__(self, sampling: Sampling, tokenizer: Any) -> None:
        self.stops = sampling.stop
        self.words = [Detokeniser(tokenizer) for _ in range(sampling.n)]
        self.kept = [""] * sampling.n
        """Of each answer, what may be the beginning of a stop text."""
        self.open = set(range(sampling.n))

    @property
    def done(self) -> bool:
        """Whether all answers have ended."""
        return not self.open

    def take(self, event: Event) -> Piece:
        """What an event adds."""
        end = event.finish is not None
        tokens = event.tokens
        if event.finish == "stop" and not isinstance(event.stopped, str):
            tokens = tokens[:-1]
        words = self.words[event.index]
        said = self.kept[event.index] + "".join(words.add(token.id) for token in tokens)
        said += words.rest() if end else ""
        text, self.kept[event.index] = self._shown(said, end)
        if end:
            self.open.discard(event.index)
        return Piece(text, tokens, event.finish, event.index, event.stopped)

    def _shown(self, said: str, end: bool) -> tuple[str, str]:
        """What is sure to be of the answer, and what is not yet."""
        found = [at for stop in self.stops if (at := said.find(stop)) >= 0]
        if found:
            return said[: min(found)], ""
        most = 0 if end else max((_begun(said, stop) for stop in self.stops), default=0)
        return said[: len(said) - most], said[len(said) - most :]


def _begun(said: str, stop: str) -> int:
    """How many letters at the end of `said` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(said)), 0, -1) if said.endswith(stop[:n])), 0)
