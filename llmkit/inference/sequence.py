"""One answer in the making, as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from llmkit.inference.blocks import chain
from llmkit.inference.request import Request


@dataclass(eq=False)
class Sequence:
    """A prompt, and what follows it so far."""

    request: Request
    index: int
    """Which of the request's answers."""
    tokens: list[int]
    drafts: list[int] = field(default_factory=list)
    """What may follow `tokens`: computed with them, and taken over as far as they are right."""
    parents: list[int] = field(default_factory=list)
    """Of each draft the earlier one that it follows, -1 for the newest token; none: each follows the one before."""
    names: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were made; the first is that of the empty prefix."""
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens whose keys and values lie in the blocks."""
    published: int = 0
    """Blocks that can be found by their names."""
    found: int = 0
    """Tokens that were in the cache when it began."""
    charged: int = 0
    """Tokens that its tenant was charged for."""
    begun: bool = False
    """Whether anything was computed for it."""
    rests: bool = False
    """Whether what follows it is known, and it waits for others: then it comes after all that do not."""
    order: int = 0
    """When it came, among all."""
    adapter: str = ""
    """The key of the version that it is made with."""
    before: int = 0
    """Virtual tokens before the prompt: the first of `tokens`, which are past the vocabulary."""
    width: int = 1
    """How many it will be: those that are to be forked from it are counted from the beginning."""

    @property
    def made(self) -> int:
        """Tokens that were made."""
        return len(self.tokens) - len(self.request.prompt) - self.before

    @property
    def said(self) -> list[int]:
        """The tokens that were made."""
        return self.tokens[self.before + len(self.request.prompt) :]

    @property
    def length(self) -> int:
        """Tokens and drafts."""
        return len(self.tokens) + len(self.drafts)

    @property
    def waiting(self) -> int:
        """Tokens whose keys and values are to be made; the last one's give the next token."""
        return self.length - self.cached

    @property
    def reads(self) -> bool:
        """Whether there is more to compute than its newest token and what may follow it: it is at its prompt."""
        return len(self.tokens) - self.cached > 1

    def text(self, start: int, end: int) -> list[int]:
        """Tokens and drafts [start, end)."""
        known = len(self.tokens)
        return self.tokens[start:end] + (self.drafts[max(0, start - known) : end - known] if end > known else [])

    def slot(self, at: int, size: int) -> int:
        """Where the keys and values of its token `at` lie, by blocks of `size`: block * size + place in it."""
        return self.blocks[at // size] * size + at % size

    def fork(self, index: int) -> Sequence:
        """Another answer that goes on from here, over the same blocks."""
        tokens, names, blocks = list(self.tokens), list(self.names), list(self.blocks)
        return replace(self, index=index, tokens=tokens, names=names, blocks=blocks, drafts=[], parents=[], width=1)

    def name(self, count: int, size: int) -> list[bytes]:
        """The names of the first `count` blocks of `size` tokens."""
        while len(self.names) <= count:
            at = (len(self.names) - 1) * size
            self.names.append(chain(self.names[-1], self.tokens[at : at + size]))
        return self.names[1 : count + 1]
