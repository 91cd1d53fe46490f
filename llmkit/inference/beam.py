"""Beam search: of all continuations of the open texts the likeliest stay open, and the best that end are kept.

The rules are those of transformers' `generate(num_beams=...)`, so that both give the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llmkit.inference.request import Finish, RequestError, Token
from llmkit.inference.sampler import no_token, normaliser, tops
from llmkit.inference.sequence import Sequence
from llmkit.inference.shortlist import Row, largest
from llmkit.inference.steer import Steer


@dataclass(eq=False)
class Beam:
    """A text that is open."""

    sequence: Sequence
    steer: Steer
    score: float = 0.0
    """The sum of its tokens' log-probabilities."""
    path: tuple[Token, ...] = ()
    nexts: tuple[Token, ...] | None = None
    """What may follow, once it is computed; the likeliest first."""


@dataclass(frozen=True)
class Found:
    """A text that has ended."""

    score: float
    """The sum of its tokens' log-probabilities over length ** length_penalty."""
    path: tuple[Token, ...]
    finish: Finish
    stopped: int | None = None
    """The token that ended it, where it was one that the request named."""


Branch = tuple[float, Beam, Token]
"""A score, what it goes on from, and by which token."""


class Beams:
    """The search for one request."""

    def __init__(self, first: Sequence, steer: Steer, ends: Seq[int]) -> None:
        """`ends`: the tokens that end a text."""
        self.sampling, self.ends = steer.rules.sampling, set(ends)
        self.kept = max(2, 1 + len(ends)) * self.sampling.beams
        """Continuations that are looked at, so that enough of them do not end."""
        self.open = {first: Beam(first, steer)}
        self.found: list[Found] = []
        """The best first, at most as many as there are beams."""
        self.better = True
        """Whether an open text may still come to be better than those that were found."""

    def see(self, one: Sequence, logits: Tensor) -> None:
        """What may follow one of the open texts, by its logits (V,).

        Raises:
            RequestError: they are no numbers.
        """
        beam, row = self.open[one], logits.cpu().numpy()
        whole = normaliser(row)
        logprobs: Row = row - np.float32(whole)
        law = beam.steer.law(logprobs)
        if np.isnan(law).any():
            raise no_token(float("nan"))
        count, top = self.sampling.logprobs, tops(row, self.sampling.logprobs or 0, whole)
        ids = [int(id) for id in largest(law, min(self.kept, len(law))) if np.isfinite(law[id])]
        ids.sort(key=lambda id: (-law[id], id))
        told = None if count is None else logprobs
        beam.nexts = tuple(Token(i, None if told is None else float(told[i]), float(law[i]), top) for i in ids)

    @property
    def ready(self) -> bool:
        """Whether what follows is known of all that are open."""
        return all(beam.nexts is not None for beam in self.open.values())

    def turn(self) -> list[Branch]:
        """The texts that are open from here on; none where the search is over."""
        width, early = self.sampling.beams, self.sampling.early_stopping
        branches = [
            (beam.score + (token.sampling_logprob or 0.0), beam, token)
            for beam in self.open.values()
            for token in beam.nexts or ()
        ]
        best = sorted(branches, key=lambda branch: -branch[0])[: self.kept]
        length = 1 + max((len(beam.path) for beam in self.open.values()), default=0)
        going = [one for one in best if not self._ends(one[2], length)][:width]
        if self.better and not (early is True and len(self.found) == width):
            self._keep([one for one in best[:width] if self._ends(one[2], length)], length)
        return going if going and self._goes_on(going[0][0], length) else []

    def results(self) -> list[Found]:
        """The best texts, as many as were asked for.

        Raises:
            RequestError: there are not so many.
        """
        if len(self.found) < self.sampling.n:
            what = f"no more than {len(self.found)} texts may be made"
            raise RequestError(what, fix="ask for fewer, or allow more tokens", key="n")
        return self.found[: self.sampling.n]

    def _ends(self, token: Token, length: int) -> bool:
        return token.id in self.ends or length >= self.sampling.max_tokens

    def _keep(self, ended: Seq[Branch], length: int) -> None:
        for score, beam, token in ended:
            finish: Finish = "stop" if token.id in self.ends else "length"
            stopped = token.id if token.id in self.sampling.stop_ids else None
            by = length**self.sampling.length_penalty
            self.found.append(Found(score / by, (*beam.path, token), finish, stopped))
        self.found = sorted(self.found, key=lambda one: -one.score)[: self.sampling.beams]

    def _goes_on(self, best: float, length: int) -> bool:
        """Whether the best open text, if it ended at a length that is guessed, would be better than the worst found."""
        sampling, full = self.sampling, len(self.found) == self.sampling.beams
        reach = sampling.max_tokens if sampling.early_stopping == "never" and sampling.length_penalty > 0 else length
        self.better = self.better and (not full or best / reach**sampling.length_penalty > self.found[-1].score)
        return self.better and not (full and sampling.early_stopping is True)
