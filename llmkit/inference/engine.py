"""The engine: requests in, events out, one step at a time. It knows neither threads nor text beyond stop strings."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from torch import Tensor

from llmkit.inference.adapters import Adapters, Version
from llmkit.inference.answers import Answers
from llmkit.inference.blocks import Blocks, salted
from llmkit.inference.request import Event, Finish, Request, RequestError, Token
from llmkit.inference.runner import Runner
from llmkit.inference.sampler import choose, scored
from llmkit.inference.scheduler import Chunk, Limits, Scheduler, Step
from llmkit.inference.sequence import Sequence
from llmkit.inference.steer import Steer
from llmkit.inference.text import Texts


@dataclass(frozen=True)
class Facts:
    """What a model can be asked."""

    words: int
    """Rows of its vocabulary."""
    longest: int
    """Tokens of a prompt and its answer together."""
    ends: tuple[int, ...]
    """Tokens that end a text by themselves."""


@dataclass
class Live:
    """A request that is being answered."""

    request: Request
    sequences: list[Sequence]
    adapter: Version
    """What it holds until it ends."""
    answers: Answers
    prompt: list[Token | None] = field(default_factory=list)


class Engine:
    """Answers requests by continuous batching over a paged cache."""

    def __init__(
        self,
        runner: Runner,
        blocks: Blocks,
        limits: Limits,
        facts: Facts,
        texts: Texts,
        copy: Callable[[int, int], None],
        adapters: Adapters | None = None,
    ) -> None:
        """`copy` copies a block of the store."""
        self.runner, self.facts, self.texts, self.copy = runner, facts, texts, copy
        self.adapters = adapters or Adapters()
        self.version = 0
        """Of the weights."""
        self.scheduler = Scheduler(blocks, limits, self._salt)
        self.live: dict[str, Live] = {}

    def add(self, request: Request) -> None:
        """Takes a request on.

        Raises:
            RequestError: it can never be answered.
        """
        self._check(request)
        answers = Answers(request, self.facts.ends, self.texts)
        held = self._held(request)
        virtual = range(self.facts.words, self.facts.words + held.before)
        first = Sequence(request, 0, [*virtual, *request.prompt], width=request.sampling.n)
        first.adapter, first.before = held.key, held.before
        self.live[request.id] = Live(request, [first], held, answers)
        self.scheduler.add(first)

    def abort(self, id: str) -> None:
        """Nobody waits for this one any longer; a name that is not known is let pass: it may just have ended."""
        live = self.live.pop(id, None)
        if live is not None:
            self.scheduler.remove(live.sequences)
            self.adapters.release(live.adapter)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.live

    def step(self) -> list[Event]:
        """Computes one step, and tells what it made."""
        step = self.scheduler.plan(time.monotonic())
        events = [self._end(one, [], "deadline") for one in step.late]
        if step.chunks:
            events += self._computed(step)
        return events

    def _computed(self, step: Step) -> list[Event]:
        for source, target in step.copies:
            self.copy(source, target)
        whole = [self._tells_prompt(chunk) for chunk in step.chunks]
        rows = self.runner.run(step.chunks, whole)
        self.scheduler.commit(step)
        events: list[Event] = []
        grown: list[tuple[Sequence, Tensor]] = []
        for chunk, logits, all_ in zip(step.chunks, rows, whole, strict=True):
            try:
                if all_:
                    self._tell_prompt(chunk, logits)
            except RequestError as cause:
                events.append(self._end(chunk.sequence, [], "error", why=str(cause)))
                continue
            if chunk.last:
                grown += [(each, logits[-1]) for each in self._answering(chunk.sequence)]
        tokens = choose([row for _, row in grown], [self._steer(one) for one, _ in grown])
        return events + [self._grown(one, token) for (one, _), token in zip(grown, tokens, strict=True)]

    def _answering(self, one: Sequence) -> list[Sequence]:
        """A sequence that gets a token; after the prompt, all answers to it."""
        if one.width == 1:
            return [one]
        others = self.scheduler.fork(one, range(1, one.request.sampling.n))
        self.live[one.request.id].sequences += others
        return [one, *others]

    def _steer(self, one: Sequence) -> Steer:
        return self.live[one.request.id].answers.steer(one.index)

    def _grown(self, one: Sequence, token: Token | RequestError) -> Event:
        if isinstance(token, RequestError):  # one request's own fault is no other's
            return self._end(one, [], "error", why=str(token))
        one.tokens.append(token.id)
        self._steer(one).take(token.id)
        return self._judged(one, token)

    def _judged(self, one: Sequence, token: Token) -> Event:
        """Whether the sequence goes on."""
        sampling, answers = one.request.sampling, self.live[one.request.id].answers
        if token.id in answers.ends and one.made >= sampling.min_tokens:
            own = token.id in sampling.stop_ids
            return self._end(one, [token], "stop", stopped=token.id if own else None)
        found = answers.stopped(one.index, token.id)
        if found is not None:
            return self._end(one, [token], "stop", stopped=found)
        if one.made >= sampling.max_tokens:
            return self._end(one, [token], "length")
        return self._event(one, (token,))

    def _end(
        self, one: Sequence, tokens: Seq[Token], finish: Finish, why: str = "", stopped: int | str | None = None
    ) -> Event:
        event = self._event(one, tuple(tokens), finish, why, stopped)
        live = self.live[one.request.id]
        if finish != "deadline":
            self.scheduler.remove([one])
        live.sequences.remove(one)
        if not live.sequences:
            del self.live[one.request.id]
            self.adapters.release(live.adapter)
        return event

    def _event(
        self,
        one: Sequence,
        tokens: tuple[Token, ...],
        finish: Finish | None = None,
        why: str = "",
        stopped: int | str | None = None,
    ) -> Event:
        told = self.live[one.request.id].prompt if one.made <= 1 and one.index == 0 else []
        return Event(one.request.id, one.index, tokens, finish, why, tuple(told) or None, one.found, stopped)

    def _tells_prompt(self, chunk: Chunk) -> bool:
        one = chunk.sequence
        known = len(self.live[one.request.id].prompt)
        return one.request.sampling.prompt_logprobs is not None and known < len(one.request.prompt) and one.made == 0

    def _tell_prompt(self, chunk: Chunk, logits: Tensor) -> None:
        """Place t of the logits is about token t + 1."""
        request, told = chunk.sequence.request, self.live[chunk.sequence.request.id].prompt
        if not told:
            told.append(None)
        first = chunk.start + 1 - chunk.sequence.before
        for row, at in enumerate(range(first, min(first + chunk.end - chunk.start, len(request.prompt)))):
            if at == len(told):  # after a preemption what was told is made again
                told.append(scored(logits[row], request.prompt[at], request.sampling.prompt_logprobs))

    def _salt(self, one: Sequence) -> bytes:
        return salted(one.request.tenant, one.adapter, str(self.version))

    def _held(self, request: Request) -> Version:
        """The version of its adapter, which it holds from now on."""
        held = self.adapters.hold(request.adapter)
        try:
            self._check_length(request, self.facts.longest - held.before)
        except RequestError:
            self.adapters.release(held)
            raise
        return held

    def _check_length(self, request: Request, longest: int) -> None:
        sampling = request.sampling
        asked = len(request.prompt) + sampling.max_tokens
        if len(request.prompt) >= longest:
            what = f"has {len(request.prompt)} tokens; the model takes {longest}, the answer included"
            raise RequestError(what, fix="ask for less", key="prompt")
        if asked > longest:
            most = longest - len(request.prompt)
            what = f"{sampling.max_tokens} after a prompt of {len(request.prompt)} is past the {longest} that there are"
            raise RequestError(what, fix=f"give at most {most}", key="max_tokens")

    def _check(self, request: Request) -> None:
        sampling = request.sampling
        if request.id in self.live:
            raise RequestError(f"{request.id} is being answered already", fix="give another id", key="id")
        if not request.prompt:
            raise RequestError("holds no tokens", fix="ask something", key="prompt")
        if sampling.n > self.scheduler.limits.sequences:
            most = self.scheduler.limits.sequences
            raise RequestError(f"{sampling.n} answers at once", fix=f"ask for at most {most}", key="n")
        lists = {
            "prompt": request.prompt,
            "stop_ids": sampling.stop_ids,
            "allowed_ids": sampling.allowed_ids,
            "logit_bias": tuple(sampling.logit_bias),
        }
        for key, ids in lists.items():
            if wrong := [id for id in ids if not 0 <= id < self.facts.words]:
                what = f"token {wrong[0]} is none of the {self.facts.words} of the vocabulary"
                raise RequestError(what, fix="give tokens of this model", key=key)
