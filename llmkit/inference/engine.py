"""The engine: requests in, events out, one step at a time. It knows neither threads nor text beyond stop strings."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from llmkit.inference.adapters import Adapters, Version
from llmkit.inference.answers import Answers
from llmkit.inference.beam import Beams
from llmkit.inference.blocks import Blocks
from llmkit.inference.branch import branch
from llmkit.inference.check import Facts, check, check_length
from llmkit.inference.gauges import Stats, Tally
from llmkit.inference.live import Live
from llmkit.inference.place import Place
from llmkit.inference.planner import plan
from llmkit.inference.request import Event, Finish, InternalError, Request, RequestError, Token, alone
from llmkit.inference.runner import Runner
from llmkit.inference.sampler import choose
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits, Scheduler, Step
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.speculator import Speculator
from llmkit.inference.steer import Steer
from llmkit.inference.text import Texts
from llmkit.inference.update import Update


class Engine:
    """Answers requests by continuous batching over a paged cache.

    Every answer of a request that was added and not aborted ends in exactly one event with a `finish`.
    """

    def __init__(
        self,
        runner: Runner,
        blocks: Blocks,
        limits: Limits,
        facts: Facts,
        texts: Texts,
        copy: Callable[[int, int], None],
        adapters: Adapters | None = None,
        speculator: Speculator | None = None,
        move: Callable[[Seq[int], Seq[int]], None] | None = None,
    ) -> None:
        """`copy` copies a block of the store; `move` copies keys and values from slots (block * size + place in it) to
        slots: without it no tree is drafted."""
        self.runner, self.facts, self.texts, self.copy, self.move = runner, facts, texts, copy, move
        self.speculator = speculator
        self.adapters = adapters or Adapters()
        self.scheduler = Scheduler(blocks, limits)  # that knows us not: a cycle would keep the cache until collected
        self.live: dict[str, Live] = {}
        self.updates: deque[Update] = deque()
        self.untold: list[Event] = []
        """What happened in a step that failed after it."""
        self.tally = Tally()

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.scheduler.version

    @version.setter
    def version(self, version: int) -> None:
        self.scheduler.version = version

    def prepare(self, sampling: Sampling, adapter: str) -> None:
        """Does before `add` what takes long of it, a grammar or an adapter to be read again: in another thread than
        that of the steps, which then wait for neither.

        Raises:
            RequestError: as `add`.
        """
        with alone("it cannot be prepared"):
            if sampling.grammar is not None:
                self.texts.matcher(sampling.grammar, self.facts.words, self.facts.ends)
            self.adapters.prepare(adapter)

    def long(self, sampling: Sampling, adapter: str) -> bool:
        """Whether there is anything to prepare."""
        return sampling.grammar is not None or self.adapters.away(adapter)

    def add(self, request: Request) -> None:
        """Takes a request on.

        Raises:
            RequestError: it can never be answered.
        """
        if request.id in self.live:
            raise RequestError(f"{request.id} is being answered already", fix="give another id", key="id")
        with alone("it cannot be taken on"):
            check(request, self.facts, self.scheduler.limits)
            answers = Answers(request, self.facts, self.texts)
            held = self._adapter(request)
            try:
                live, first = self._begun(request, answers, held)
                self.scheduler.add(first)
            except BaseException:
                self.adapters.release(held)
                raise
        self.live[request.id] = live
        self.tally.requests += 1

    def _begun(self, request: Request, answers: Answers, held: Version) -> tuple[Live, Sequence]:
        virtual = range(self.facts.words, self.facts.words + held.before)
        first = Sequence(request, 0, [*virtual, *request.prompt], width=max(request.sampling.n, request.sampling.beams))
        first.adapter, first.before = held.key, held.before
        beams = Beams(first, answers.steer(0), answers.ends) if request.sampling.beams > 1 else None
        return Live(request, held, answers, {first}, set(range(request.sampling.n)), beams), first

    def abort(self, id: str) -> None:
        """Nobody waits for this one any longer: what it holds is free at once, and no event comes of it.

        A name that is not known is let pass: it may just have ended.
        """
        live = self.live.get(id)
        if live is not None:
            self._close(live)
            self.tally.aborted += 1

    def update(self, work: Callable[[], None], drain: bool = True) -> Update:
        """Changes the weights between two steps: at once if nothing has begun, else when that has ended, while new
        requests wait. `version` rises, and the prefixes that are kept are forgotten.

        `work` changes all weights or, when it raises, none: then the old ones go on, and `failed` tells why. Without
        `drain` what has begun goes on under the new weights: its cache is computed again, and each event tells the
        version that made it.
        """
        update = Update(work, drain)
        self.updates.append(update)
        self.scheduler.held = True
        self._renew()
        return update

    def forget(self) -> None:
        """Empties the prefix cache."""
        self.scheduler.blocks.forget()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.live and not self.updates and not self.untold

    def step(self) -> list[Event]:
        """Computes one step, and tells what it made. Where the model itself fails nothing is lost: a further step
        computes it again."""
        self._renew()
        began = time.perf_counter()
        self._speculate()
        ready, looked = time.perf_counter(), self.tally.drafted
        step = plan(self.scheduler, time.monotonic())
        self.untold += self._late(step)
        if step.chunks:
            self._compute(step)
            self._timed(step.tokens, began, ready, self.tally.drafted > looked)
        events, self.untold = self.untold, []
        return events

    def stats(self) -> Stats:
        """What there is now, and what was counted since the beginning."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        held, counted = blocks.count - blocks.room, vars(scheduler.counts) | vars(self.tally)
        counted |= {"queued": scheduler.queued, "running": len(scheduler.running), "blocks": blocks.count, "used": held}
        fallen = () if self.speculator is None else tuple(self.speculator.fallen)
        return Stats(version=self.version, **counted | {"kept": tuple(self.tally.kept), "fallen": fallen})

    def _speculate(self) -> None:
        """Drafts for those that make their next tokens; beams have none, since what follows them is not one token."""
        if self.speculator is None:
            return
        running = [one for one in self.scheduler.running if self.live[one.request.id].beams is None]
        reading = sum(one.waiting for one in running if one.reads)
        first = self.scheduler.next()
        reading += 0 if first is None else len(first.tokens)
        room = self.scheduler.limits.tokens
        trees = self.move is not None and self.runner.forward.trees
        self.speculator.propose(running, self._steer, room, min(reading, room // 2), trees)

    def _timed(self, tokens: int, began: float, ready: float, looked: bool) -> None:
        """A step ends that began then, whose drafts were ready then, and in which some were looked at, or none."""
        now = time.perf_counter()
        self.tally.steps += 1
        self.tally.seconds += now - began
        if self.speculator is not None:
            self.tally.drafting += ready - began
            self.tally.verifying += (now - ready) * looked
            self.speculator.costs.see(tokens, now - ready)  # what drafting takes is measured by itself

    def _renew(self) -> None:
        """Carries out the updates whose turn it is."""
        while self.updates and not (self.updates[0].drain and self.scheduler.begun):
            update = self.updates.popleft()
            self.scheduler.held = bool(self.updates)
            if update.carry_out():
                self.version += 1
                self.scheduler.forget()

    def _late(self, step: Step) -> list[Event]:
        """Requests whose deadline has passed."""
        events = []
        for id in dict.fromkeys(one.request.id for one in step.late):
            live = self.live[id]
            self.tally.late += len(live.open)
            live.sequences.clear()
            events += self._close(live, "deadline")
        return events

    def _compute(self, step: Step) -> None:
        """What comes of it is untold. A fault of one request is no other's; after any other all is computed again, but
        what was chosen until then stays."""
        places, over = list[Place](), list[Place]()
        try:
            places, searched = self._places(step)
            while places:
                chosen = choose([place.logits for place in places], [self._steer(place.sequence) for place in places])
                grown = [self._grown(place, token) for place, token in zip(places, chosen, strict=True)]
                over = [place for place, goes_on in zip(places, grown, strict=True) if not goes_on]
                places = [place for place, goes_on in zip(places, grown, strict=True) if goes_on]
                self._moved(over)
                while over:
                    self._settled(over.pop(0))
            self.untold += self._searched(searched)
        except BaseException:
            self.scheduler.undo(step)
            for place in (*over, *places):
                self._settled(place)
            raise

    def _places(self, step: Step) -> tuple[list[Place], list[Place]]:
        """Where a token is to be chosen, and where beams go on."""
        whole = [self.live[chunk.sequence.request.id].tells(chunk) for chunk in step.chunks]
        for source, target in step.copies:
            self.copy(source, target)
        rows = self.runner.run(step.chunks, whole)
        if self.speculator is not None:
            self.speculator.see(step.chunks, rows)
        self.scheduler.commit(step)
        places: list[Place] = []
        searched: list[Place] = []
        for chunk, logits, all_ in zip(step.chunks, rows, whole, strict=True):
            live = self.live[chunk.sequence.request.id]
            self.tally.read += max(0, min(chunk.end, len(live.request.prompt) + chunk.sequence.before) - chunk.start)
            try:
                if all_:
                    live.tell(chunk, logits)
            except RequestError as cause:
                self.untold += self._failed(live, cause)
                continue
            if chunk.last and live.beams is not None:
                searched.append(Place(chunk.sequence, logits))
            elif chunk.last:
                one, count = chunk.sequence, chunk.drafts
                drafts, parents = one.drafts[:count], one.parents[:count]
                places += [Place(each, logits, drafts, parents) for each in self._answers(live, one)]
        return places, searched

    def _searched(self, places: Seq[Place]) -> list[Event]:
        """Beams go on where what follows is known of all of a request's; the search is seldom over."""
        events: list[Event] = []
        for place in places:
            live = self.live.get(place.request.id)
            try:
                if live is not None and live.beams is not None:
                    live.beams.see(place.sequence, place.logits)
                    self.scheduler.rest(place.sequence, True)
            except RequestError as cause:
                events += self._failed(self.live[place.request.id], cause)
        for id in dict.fromkeys(place.request.id for place in places):
            live = self.live.get(id)
            if live is not None and live.beams is not None and live.beams.ready:
                events += self._turned(live, live.beams)
        return events

    def _turned(self, live: Live, beams: Beams) -> list[Event]:
        turn = beams.turn()
        if turn:
            live.sequences = branch(self.scheduler, beams, turn)
            self.tally.made += len(turn)
            return []
        try:
            found = beams.results()
        except RequestError as cause:
            return self._failed(live, cause)
        self.tally.finished += len(found)
        cached, told = next(iter(beams.open)).found, tuple(live.prompt) or None
        live.open.clear()
        self._close(live)
        return [
            Event(
                *(live.request.id, at, one.path, one.finish, "", None if at else told, cached, one.stopped),
                version=self.version,
                steps=len(one.path),
            )
            for at, one in enumerate(found)
        ]

    def _answers(self, live: Live, one: Sequence) -> list[Sequence]:
        """The sequences that get their next token here; after the prompt, those of all answers."""
        others = self.scheduler.fork(one, range(1, one.width)) if one.width > 1 else []
        live.sequences |= set(others)
        return [one, *others]

    def _steer(self, one: Sequence) -> Steer:
        return self.live[one.request.id].answers.steer(one.index)

    def _grown(self, place: Place, token: Token | RequestError) -> bool:
        """A sequence with its next token; whether one more follows from this step, since it is what was drafted."""
        one, live = place.sequence, self.live.get(place.request.id)
        if live is None:  # another of its answers failed
            return False
        if isinstance(token, RequestError):
            place.fault = token
            return False
        one.tokens.append(token.id)
        self.tally.made += 1
        live.answers.steer(one.index).take(token.id)
        place.finish, place.stopped = live.ending(one, token)
        return place.take(token) and place.finish is None

    def _moved(self, places: Seq[Place]) -> None:
        """Keys and values of drafts that were right come to lie end to end, before anybody can find them."""
        trees = [place for place in places if place.parents and place.request.id in self.live]
        pairs = [pair for place in trees for pair in self.scheduler.moves(place.sequence, place.kept)]
        if pairs and self.move is not None:
            self.move([source for source, _ in pairs], [target for _, target in pairs])

    def _settled(self, place: Place) -> None:
        """Tells what was made at a place where no more follows in this step. A fault is its request's alone."""
        one, live = place.sequence, self.live.get(place.request.id)
        if live is None:
            return
        self.untold += self._told(live, place)
        if place.fault is not None:
            self.untold += self._failed(live, place.fault)
            return
        if place.drafts:
            self.tally.look(len(place.drafts), len(place.path))
        if one.drafts:
            self.scheduler.accept(one, len(place.kept))
        if place.finish is not None:
            self._done(live, one)

    def _told(self, live: Live, place: Place) -> list[Event]:
        """The event of what was made at a place."""
        one, made = place.sequence, tuple(place.made)
        if not made:
            return []
        told = tuple(live.prompt) or None if one.made == len(made) and one.index == 0 else None
        said = Event(one.request.id, one.index, made, place.finish, "", told, one.found, place.stopped, self.version)
        return [replace(said, drafted=len(place.drafts), accepted=len(place.path)) if place.drafts else said]

    def _failed(self, live: Live, cause: RequestError) -> list[Event]:
        self.tally.failed += 1
        return self._close(live, "error", str(cause), cause.trace if isinstance(cause, InternalError) else "")

    def _done(self, live: Live, one: Sequence) -> None:
        """An answer has come to its end."""
        self.tally.finished += 1
        self.scheduler.remove([one])
        live.sequences.remove(one)
        live.open.remove(one.index)
        if not live.open:
            self._close(live)

    def _close(self, live: Live, finish: Finish = "abort", why: str = "", trace: str = "") -> list[Event]:
        """Nothing is left of a request; an event for each answer that had not ended."""
        self.scheduler.remove(live.sequences)
        del self.live[live.request.id]
        self.adapters.release(live.adapter)
        said = Event(live.request.id, 0, (), finish, why, version=self.version, trace=trace, steps=0)
        return [replace(said, index=index) for index in sorted(live.open)]

    def _adapter(self, request: Request) -> Version:
        """The version of its adapter, which it holds from now on."""
        held = self.adapters.hold(request.adapter)
        try:
            check_length(request, self.facts.longest - held.before)
        except RequestError:
            self.adapters.release(held)
            raise
        return held
