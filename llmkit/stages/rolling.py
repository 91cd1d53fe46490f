"""The feed of rollouts: a step's prompts -> answers and what they are worth (`answering.py`) -> what they teach.

The seam between stages that learn from their own answers is `Teaching`: what is asked of models about judged answers
(with `likelihoods.py`), and the examples that come of it. Drawing (`drawing.py`), judging, the lines of
`rollouts.jsonl`, reuse and going on from a checkpoint are the same for all of them; a stage brings its `Teaching` and
opens `rolling` with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from llmkit.build.training import Built
from llmkit.core.errors import DataError
from llmkit.core.metrics import Lines
from llmkit.core.seed import mixed
from llmkit.data.asked import Asked
from llmkit.data.feed import Drawn, Feed
from llmkit.data.order import keyed
from llmkit.data.rolled import Rolled, spread_out
from llmkit.parallel.steps import Steps
from llmkit.rl.objective import CLOSE, CLOSE_HALF, SERVED
from llmkit.rl.scoring import score
from llmkit.stages.ahead import BEHAVIOUR, Ahead
from llmkit.stages.answering import Answering
from llmkit.stages.drawing import drawing
from llmkit.stages.from_rollouts import FromRollouts
from llmkit.stages.job import Job
from llmkit.stages.likelihoods import Likelihoods, likelihoods
from llmkit.stages.worth import Known, Worth, read, told


class Teaching(Protocol):
    """What a stage makes of judged answers."""

    @property
    def names(self) -> Sequence[str]:
        """Of what `known` gives."""
        ...

    def known(self, held: Sequence[Worth]) -> Known:
        """What models say of the answers' tokens before anything is learned from them: it is written with them, and
        read again by a run that goes on in their midst."""
        ...

    def taught(self, held: Sequence[Worth], known: Known) -> Rolled:
        """The answers as examples: a function of these two, and of what the teaching keeps."""
        ...

    def state(self, again: bool) -> dict[str, Any]:
        """What it keeps from rollout to rollout; `again`: as it was before the last one, which is drawn again."""
        ...

    def begin(self, state: Mapping[str, Any]) -> None:
        """Goes on with what `state` gave, or from the beginning, which has none."""
        ...


class Rolling:
    """A feed of rollouts: what a step sees follows from its number and from the weights as they are then."""

    def __init__(
        self, job: Job, asked: Asked, answering: Answering, teaching: Teaching, ahead: Ahead | None = None
    ) -> None:
        """`ahead`: what draws the next rollout while steps learn from this one."""
        self.ahead, self.version = ahead, 0
        self.job, self.asked, self.answering, self.teaching = job, asked, answering, teaching
        self.prompts, self.rollout = job.feed, answering.node.rollout
        self.lines = Lines(job.run.scratch / "rollouts.jsonl")
        self.number, self.held, self.spans = -1, list[Worth](), (0, 0)
        """The last rollout, what it drew, and where in the file it begins and ends."""
        self.made: Rolled | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the prompts."""
        return self.prompts.steps_per_epoch

    def counts(self) -> dict[str, int]:
        """Nothing that grows."""
        return {}

    def state(self, step: int) -> dict[str, Any]:
        """How much of the file is of steps before `step`: of a rollout that is used again all of it."""
        number, used = divmod(step, self.rollout.steps)
        self.lines.sync()
        again = number == self.number and not used
        kept = self.teaching.state(number == self.number)  # one in whose midst the run is, is taught again too
        held = {"rollouts_bytes": self.spans[0] if again else self.spans[1], **kept}
        return held if self.ahead is None else held | self.ahead.state(number + bool(used))

    def begin(self, state: Mapping[str, Any]) -> None:
        """Goes to where a checkpoint was: the file ends there."""
        size = int(state.get("rollouts_bytes", 0))
        self.lines.cut(size)
        if self.ahead is not None:
            self.ahead.begin(state)
        self.teaching.begin(state)
        self.number, self.held, self.spans, self.made = -1, [], (size, size), None

    def step(self, index: int) -> Drawn:
        """What 0-based step `index` sees.

        Raises:
            DataError: an answer has no reward, or what an interrupted run drew is not there.
        """
        number, used = divmod(index, self.rollout.steps)
        drawn = self.prompts.step(index)
        if number != self.number:
            if used:
                self._restore(number)
            else:
                self._roll(number, drawn)
        if self.made is None:
            raise TypeError("no rollout is there")
        made = self.made
        close = 0.0 if used else CLOSE_HALF if self.job.types.half else CLOSE
        bounds = {"close": close} | ({"drawn_close": close * (self.version == index)} if self.ahead is not None else {})
        bounds |= {"served_close": SERVED} if self.rollout.vllm is not None else {}
        each = {name: np.full(len(made.forks), bound, np.float32) for name, bound in bounds.items()}
        made = replace(made, per={**made.per, **each})
        rows = self._part(made, number, *divmod(used, self.rollout.parts))
        return Drawn(drawn.epoch, tuple(self.held[i].prompt for i in rows), made, rows)

    def _part(self, made: Rolled, number: int, turn: int, part: int) -> Sequence[int]:
        """Which prompts of the rollout a step learns from: those that count, dealt; where there are fewer of them than
        parts, each step sees all prompts."""
        parts, able = self.rollout.parts, np.flatnonzero(made.shares)
        if parts == 1 or len(able) < parts:
            return range(len(made))
        order = keyed(mixed(self.answering.node.seed, number, turn), 0, len(able)).tolist()
        return sorted(int(able[i]) for i in order[part::parts])

    def _roll(self, number: int, drawn: Drawn) -> None:
        """Answers of this step: from the weights of now, or those that were drawn ahead."""
        early = self.ahead.take(number) if self.ahead is not None and number else None
        if early is None:
            self.held, self.version = (
                self.answering.now(number, [int(i) for i in drawn.rows]),
                number * self.rollout.steps,
            )
        else:
            self.held, self.version = early.held, early.version
        known = dict(self.teaching.known(self.held))
        if self.ahead is not None:
            known[BEHAVIOUR] = self.ahead.likely(self.held) if early is None else early.behaviour
        self.made = self._taught(known)
        if not _differ(self.made):
            what = "of no prompt is one answer better than another: rewards teach nothing here"
            self.answering.notice("", f"rollout {number}: {what}")
        begin = self.spans[1]
        for line in told(number, self.version, self.asked, self.held, self.made, known, self.answering.words):
            self.lines.add(line)
        self.number, self.spans = number, (begin, self.lines.size())
        if self.ahead is not None:
            after = self.prompts.step((number + 1) * self.rollout.steps)
            self.ahead.start(number + 1, number * self.rollout.steps, [int(i) for i in after.rows])

    def _taught(self, known: Known) -> Rolled:
        made, behaviour = self.teaching.taught(self.held, known), known.get(BEHAVIOUR)
        if behaviour is not None:
            return replace(made, each={**made.each, BEHAVIOUR: spread_out(made, behaviour)})
        if self.rollout.vllm is None or self.rollout.temperature != 1.0:
            return made
        return replace(made, each={**made.each, BEHAVIOUR: made.each["engine"]})  # a server's law is not the trainer's

    def _restore(self, number: int) -> None:
        """The rollout that an interrupted run was in the midst of.

        Raises:
            DataError: the file does not hold it.
        """
        lines = [line for line in self.lines.read() if line["rollout"] == number]
        if not lines:
            what = f"holds nothing of rollout {number}, in whose midst the checkpoint was made"
            raise DataError(what, fix="go on from a checkpoint between two rollouts", file=str(self.lines.path))
        more = [] if self.ahead is None else [BEHAVIOUR]
        self.held, known = read(lines, [*self.teaching.names, *more])
        self.made, self.number, self.version = self._taught(known), number, lines[0]["version"]


def _differ(made: Rolled) -> bool:
    """Whether an answer has an advantage, where they are told."""
    held = made.each.get("advantage", made.per.get("advantage"))
    return held is None or bool(np.any(held))


@contextmanager
def rolling(
    job: Job, node: FromRollouts, built: Built, steps: Steps, teach: Callable[[Asked, Likelihoods], Teaching]
) -> Iterator[Feed]:
    """The feed of a stage that learns from its own answers; what it holds open is closed behind it. A reference is
    there before the engine takes memory.

    Raises:
        ModelError, RecipeError: the engine cannot draw from what is trained, or a reward lacks something.
    """
    if not isinstance(job.train, Asked):
        raise TypeError("rollouts are of prompts")
    with ExitStack() as stack:
        if job.run.main:
            score(node.reward, [], job.bench)  # what is missing is told now
        teaching = teach(job.train, likelihoods(job, node, built, steps))
        drawn = stack.enter_context(drawing(job, node, built, steps))
        answering, ahead = Answering(job.run, node, job.train, built, drawn, job.bench), None
        if drawn.copy is not None and node.rollout.asynchronous:
            seen = replace(drawn.subject, scored=drawn.copy.scored, model=drawn.copy.model)
            behaviour = Likelihoods(job, drawn.copy, seen)
            last = -(-job.steps // node.rollout.steps) - 1
            ahead = Ahead(answering, job.train, behaviour, job.run.scratch / "rollouts.ahead.jsonl", last)
            stack.callback(ahead.close)
        yield Rolling(job, job.train, answering, teaching, ahead)
