"""A request that is being answered: what there is of its answers, and when one of them ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit.inference.adapters import Version
from llmkit.inference.answers import Answers
from llmkit.inference.beam import Beams
from llmkit.inference.request import Finish, Request, Token
from llmkit.inference.runner import Rows
from llmkit.inference.sampler import scored
from llmkit.inference.scheduler import Chunk
from llmkit.inference.sequence import Sequence


@dataclass(eq=False)
class Live:
    """One request, from its coming to the end of its last answer."""

    request: Request
    adapter: Version
    """What it holds until it ends."""
    answers: Answers
    """What its tokens are chosen by."""
    sequences: set[Sequence]
    """What the scheduler has of it."""
    open: set[int]
    """Answers that have not ended."""
    beams: Beams | None = None
    """Where several texts are searched for."""
    prompt: list[Token | None] = field(default_factory=list)
    """What is known of the prompt's tokens, where it was asked."""

    def tells(self, chunk: Chunk) -> bool:
        """Whether a chunk has tokens of the prompt whose log-probabilities are asked for and not known."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and len(self.prompt) < len(self.request.prompt) and chunk.sequence.made == 0

    def tell(self, chunk: Chunk, logits: Rows) -> None:
        """Reads them off `logits`: place t is about token t + 1."""
        if not self.prompt:
            self.prompt.append(None)
        first = chunk.start + 1 - chunk.sequence.before
        for row, at in enumerate(range(first, min(first + chunk.end - chunk.start, len(self.request.prompt)))):
            if at == len(self.prompt):  # after a preemption what was told is made again
                self.prompt.append(scored(logits[row], self.request.prompt[at], self.request.sampling.prompt_logprobs))

    def ending(self, one: Sequence, token: Token) -> tuple[Finish | None, int | str | None]:
        """How an answer ends with `token`, its newest, if it does; and what the request named that ended it."""
        sampling = self.request.sampling
        if token.id in self.answers.ends and one.made >= sampling.min_tokens:
            return "stop", token.id if token.id in sampling.stop_ids else None
        found = self.answers.stopped(one.index, token.id)
        if found is not None:
            return "stop", found
        return ("length" if one.made >= sampling.max_tokens else None), None
