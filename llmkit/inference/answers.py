"""What the answers to one request are chosen by, and what looks for their stop texts."""

from __future__ import annotations

from llmkit.inference.check import Facts
from llmkit.inference.request import Request
from llmkit.inference.steer import Rules, Steer
from llmkit.inference.text import Stream, Texts


class Answers:
    """By the number of each answer: its state of choosing, and its text where a stop text may end it."""

    def __init__(self, request: Request, facts: Facts, texts: Texts) -> None:
        """
        Raises:
            RequestError: what is asked cannot be held to.
        """
        sampling = self.sampling = request.sampling
        self.texts = texts
        own = () if sampling.ignore_eos and sampling.grammar is None else facts.ends
        self.ends = (*own, *sampling.stop_ids)
        words = texts.bad(sampling.bad_words)
        possible = [one for one in words if max(one) < facts.words]  # a tokenizer may have more than the model can make
        self.rules = Rules(request, self.ends, possible)
        self.matcher = None if sampling.grammar is None else texts.matcher(sampling.grammar, facts.words, facts.ends)
        """Before the first token."""
        self.steers: dict[int, Steer] = {}
        self.streams: dict[int, Stream] = {}

    def steer(self, index: int) -> Steer:
        """That of an answer."""
        if index not in self.steers:
            matcher = None if self.matcher is None else self.matcher.fork()
            self.steers[index] = Steer(self.rules, [], index, matcher=matcher)
        return self.steers[index]

    def stopped(self, index: int, token: int) -> str | None:
        """The stop text that is complete with this token."""
        if not self.sampling.stop:
            return None
        if index not in self.streams:
            self.streams[index] = self.texts.stream(self.sampling)
        self.streams[index].add(token)
        return self.streams[index].stopped
