"""From the engine's events to completions."""

from __future__ import annotations

from llmkit.inference.request import Completion, Event, Output, Request, Token
from llmkit.inference.text import Texts


class Collected:
    """The answers to one request, as they grow."""

    def __init__(self, request: Request, texts: Texts) -> None:
        self.request, self.texts = request, texts
        self.tokens: dict[int, list[Token]] = {index: [] for index in range(request.sampling.n)}
        self.ended: dict[int, Event] = {}
        self.first: Event | None = None

    def take(self, event: Event) -> bool:
        """Whether all answers are there."""
        self.first = self.first or event
        self.tokens[event.index] += event.said
        if event.finish is not None:
            self.ended[event.index] = event
        return len(self.ended) == len(self.tokens)

    def completion(self) -> Completion:
        """All of it."""
        told = self.first.prompt if self.first is not None else None
        outputs = tuple(self._output(index) for index in self.tokens)
        cached, version = (self.first.cached, self.first.version) if self.first else (0, 0)
        return Completion(outputs, len(self.request.prompt), told, cached, version)

    def _output(self, index: int) -> Output:
        tokens, end = self.tokens[index], self.ended[index]
        ids = tuple(token.id for token in tokens)
        text = self.texts.whole(ids, self.request.sampling)
        logprobs = tuple(tokens) if self.request.sampling.logprobs is not None else ()
        return Output(text, ids, str(end.finish), logprobs, end.stopped, end.why)
