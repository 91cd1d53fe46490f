"""What moves logits before a token is drawn: penalties, bias, the request's own processors, then what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.inference.request import Processor, Request, RequestError
from llmkit.inference.shortlist import Row

NEVER = np.float32("-inf")


class Matcher(Protocol):
    """What a grammar allows after the tokens that it has taken."""

    def mask(self, words: int) -> NDArray[np.bool_]:
        """(V,): which tokens may come next."""
        ...

    def take(self, token: int) -> None:
        """This one came."""
        ...

    def back(self, count: int) -> None:
        """The last `count` did not come."""
        ...

    def fork(self) -> Matcher:
        """The same state once more."""
        ...


class Rules:
    """What holds for all answers to a request."""

    def __init__(self, request: Request, ends: Sequence[int], bad: Sequence[tuple[int, ...]] = ()) -> None:
        """`ends`: the tokens that would end a text; `bad`: sequences of tokens that are not made."""
        self.sampling, self.prompt, self.processors = request.sampling, request.prompt, request.processors
        self.ends = np.array(ends, np.int64)
        asked, bias = request.sampling, request.sampling.logit_bias
        self.biased, self.bias = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)
        self.allowed = np.array(request.sampling.allowed_ids, np.int64)
        self.banned = np.array([one[0] for one in bad if len(one) == 1], np.int64)
        self.longer: dict[int, list[tuple[int, ...]]] = {}
        """Sequences of several, by the last token but one."""
        for one in bad:
            if len(one) > 1:
                self.longer.setdefault(one[-2], []).append(one)
        self.counts = bool(asked.presence_penalty or asked.frequency_penalty)
        self.repeats = asked.repetition_penalty != 1
        self.asked = np.unique(np.array(self.prompt, np.int64)) if self.repeats else self.ends
        self.moves = bool(self.counts or self.repeats or bias or asked.allowed_ids or bad or self.processors)


class Times:
    """How often each of some tokens was made: as short as they are few, whatever the vocabulary."""

    def __init__(self, made: Sequence[int] = ()) -> None:
        ids, counts = np.unique(np.array(made, np.int64), return_counts=True)
        self.places = {int(token): at for at, token in enumerate(ids)}
        self._ids, self._counts = ids, counts.astype(np.int32)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Each token that was made, be it taken back."""
        return self._ids[: len(self.places)]

    @property
    def counts(self) -> NDArray[np.int32]:
        """Of each of `ids`."""
        return self._counts[: len(self.places)]

    def add(self, token: int, times: int) -> None:
        """It was made `times` more."""
        at = self.places.setdefault(token, len(self.places))
        if at == len(self._ids):  # twice the room, so that a long text moves each token but a few times
            more = max(16, at)
            self._ids = np.append(self._ids, np.zeros(more, np.int64))
            self._counts = np.append(self._counts, np.zeros(more, np.int32))
        self._ids[at] = token
        self._counts[at] += times

    def fork(self) -> Times:
        """The same once more."""
        made = Times()
        made.places, made._ids, made._counts = dict(self.places), self._ids.copy(), self._counts.copy()
        return made


@dataclass(eq=False)
class Steer:
    """One answer in the making: what its next token may be."""

    rules: Rules
    made: list[int]
    index: int = 0
    """Which of the request's answers."""
    times: Times | None = None
    """How often each token was made, where a penalty asks for it."""
    matcher: Matcher | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing moves the logits at this place."""
        return not self.rules.moves and self.matcher is None and len(self.made) >= self.rules.sampling.min_tokens

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token, alone, is all that is asked."""
        return self.plain and self.rules.sampling.temperature == 0 and self.rules.sampling.logprobs is None

    def take(self, token: int) -> None:
        """This one was made."""
        self.made.append(token)
        if self.times is not None:
            self.times.add(token, 1)
        if self.matcher is not None and token not in self.rules.ends:
            self.matcher.take(token)

    def back(self, count: int) -> None:
        """The last `count` were not made after all."""
        gone = self.made[len(self.made) - count :]
        del self.made[len(self.made) - count :]
        if self.times is not None:
            for token in gone:
                self.times.add(token, -1)
        if self.matcher is not None:
            self.matcher.back(sum(token not in self.rules.ends for token in gone))

    def fork(self, index: int) -> Steer:
        """Another answer that goes on from here."""
        times = None if self.times is None else self.times.fork()
        matcher = None if self.matcher is None else self.matcher.fork()
        return Steer(self.rules, list(self.made), index, times, matcher)

    def law(self, logits: Row) -> Row:
        """The logits from which the next token is drawn; `logits` (V,) itself is left as it is.

        Raises:
            RequestError: a processor failed.
        """
        if self.plain:
            return logits
        rules, law = self.rules, self._penalised(logits.copy())
        law[rules.biased] += rules.bias
        for processor in rules.processors:
            law = _processed(processor, rules.prompt, self.made, law)
        if len(rules.allowed):
            kept = law[rules.allowed]
            law[:] = NEVER
            law[rules.allowed] = kept
        law[rules.banned] = NEVER
        law[self._completing()] = NEVER
        return self._bounded(law)

    def _bounded(self, law: Row) -> Row:
        """Without what would end the text too early, or what the grammar has no room for."""
        sampling = self.rules.sampling
        early = len(self.made) < sampling.min_tokens
        if self.matcher is None:
            law[self.rules.ends[: len(self.rules.ends) if early else 0]] = NEVER
            return law
        mask, ends = self.matcher.mask(len(law)), self.rules.ends
        done = mask.sum() == mask[ends].sum()  # where the grammar is at its end, so is the text
        if (early or sampling.ignore_eos) and not done:
            mask[ends] = False
        law[~mask] = NEVER
        return law

    def _penalised(self, law: Row) -> Row:
        rules, sampling = self.rules, self.rules.sampling
        if not (rules.counts or rules.repeats):
            return law
        if self.times is None:
            self.times = Times(self.made)
        ids, counts = self.times.ids, self.times.counts
        if rules.repeats:
            seen = np.concatenate([rules.asked, ids[counts > 0]])  # some twice, which get the same twice
            by, held = np.float32(sampling.repetition_penalty), law[seen]
            law[seen] = np.where(held > 0, held / by, held * by)
        if rules.counts:
            law[ids] -= np.float32(sampling.presence_penalty) * (counts > 0)
            law[ids] -= np.float32(sampling.frequency_penalty) * counts
        return law

    def _completing(self) -> list[int]:
        """The tokens that would complete a sequence that is not to be made."""
        if not self.rules.longer:
            return []
        last = self.made[-1] if self.made else self.rules.prompt[-1]
        close = self.rules.longer.get(last, ())
        return [one[-1] for one in close if self._tail(len(one) - 1) == one[:-1]]

    def _tail(self, count: int) -> tuple[int, ...]:
        own = self.made[-count:]
        missing = count - len(own)
        return (*(self.rules.prompt[-missing:] if missing else ()), *own)


def _processed(processor: Processor, prompt: Sequence[int], made: Sequence[int], law: Row) -> Row:
    """What a function of the user makes of the law."""
    name = getattr(processor, "__qualname__", type(processor).__qualname__)
    try:
        given = processor(prompt, tuple(made), torch.from_numpy(law))
    except Exception as cause:
        what = f"{name} failed: {type(cause).__name__}: {cause}"
        raise RequestError(what, fix="mend the processor", key="processors") from cause
    if not isinstance(given, Tensor) or given.shape != law.shape:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        what = f"{name} gave {shape} where ({len(law)},) is asked for"
        raise RequestError(what, fix="give logits for each token", key="processors")
    out: Row = given.detach().to("cpu", torch.float32).numpy().copy()  # it may give one tensor of its own each time
    return out
