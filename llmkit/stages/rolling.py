"""Where the batches of a policy come from: a step's prompts, the policy's own answers, what they are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from llmkit.build.training import Built
from llmkit.core.errors import DataError
from llmkit.core.metrics import Lines
from llmkit.core.seed import mixed
from llmkit.core.types import Batch, Needs
from llmkit.data.asked import Asked
from llmkit.data.batches import micro_batches
from llmkit.data.feed import Drawn, Feed
from llmkit.data.node import NoPacking
from llmkit.data.order import keyed
from llmkit.data.render import Renderer
from llmkit.data.rolled import Rolled, figures, rolled, spread_out
from llmkit.inference.generate import ends
from llmkit.models.heads import Scored
from llmkit.models.referred import resting, without_adapter
from llmkit.parallel.steps import Steps
from llmkit.rl.advantages import without_signal
from llmkit.rl.bench import Bench
from llmkit.rl.conversation import Speech
from llmkit.rl.learned import Learned, learned
from llmkit.rl.objective import CLOSE, CLOSE_HALF
from llmkit.rl.rollout import Answer, converse, draw, samples, seeds
from llmkit.rl.scoring import Scores, score
from llmkit.stages.drawing import Drawing, drawing
from llmkit.stages.job import Job
from llmkit.stages.measured import subject
from llmkit.stages.policy import Policy
from llmkit.stages.reference import Second
from llmkit.stages.referring import loaded


@dataclass(frozen=True)
class Worth:
    """A group of answers, judged."""

    prompt: int
    answers: list[Answer]
    total: list[float]
    each: dict[str, list[float]]
    """By reward."""


class Rolling:
    """A feed of rollouts: what a step sees follows from its number and from the weights as they are then."""

    def __init__(self, job: Job, built: Built, steps: Steps, drawing: Drawing, bench: Bench, reference: Any) -> None:
        """`reference`: a second model that the policy is compared with; without one, what is below its adapter."""
        if not isinstance(job.node, Policy) or not isinstance(job.train, Asked):
            raise TypeError("rollouts are of prompts, in a policy stage")
        if not isinstance(built.scored, Scored):
            raise TypeError("a policy is a language model")
        self.job, self.built, self.node, self.asked = job, built, job.node, job.train
        self.drawing, self.bench, self.prompts = drawing, bench, job.feed
        self.subject, self.second = subject(job, built, steps), reference
        self.lines = Lines(job.run.scratch / "rollouts.jsonl")
        self.number, self.held, self.spans = -1, list[Worth](), (0, 0)
        """The last rollout, what it drew, and where in the file it begins and ends."""
        self.made: Rolled | None = None
        self.ends = tuple(ends(built.loaded.model, built.loaded.tokenizer))
        node = job.node.rollout.environment
        self.environment = None if node is None else node.open()
        self.speech = None if node is None else Speech.of(Renderer(built.loaded.tokenizer), self.ends)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the prompts."""
        return self.prompts.steps_per_epoch

    def counts(self) -> dict[str, int]:
        """Nothing that grows."""
        return {}

    def state(self, step: int) -> dict[str, Any]:
        """How much of the file is of steps before `step`: of a rollout that is used again all of it."""
        number, used = divmod(step, self.node.rollout.reuse)
        self.lines.sync()
        again = number == self.number and not used
        return {"rollouts_bytes": self.spans[0] if again else self.spans[1]}

    def begin(self, state: Mapping[str, Any]) -> None:
        """Goes to where a checkpoint was: the file ends there."""
        size = int(state.get("rollouts_bytes", 0))
        self.lines.cut(size)
        self.number, self.held, self.spans, self.made = -1, [], (size, size), None

    def step(self, index: int) -> Drawn:
        """What 0-based step `index` sees.

        Raises:
            DataError: an answer has no reward, or what an interrupted run drew is not there.
        """
        number, used = divmod(index, self.node.rollout.reuse)
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
        made = replace(made, per={**made.per, "close": np.full(len(made.forks), close, np.float32)})
        return Drawn(drawn.epoch, tuple(worth.prompt for worth in self.held), made, range(len(made)))

    def _roll(self, number: int, drawn: Drawn) -> None:
        """Answers of this step, from the weights of now."""
        self.held = self.drawing.over(lambda: self._worthy(number, [int(i) for i in drawn.rows]))
        old, reference = self._known(self._bare())
        self.made = self._taught(old, reference)
        begin = self.spans[1]
        for line in told(number, self.asked, self.held, self.made, old, reference, self.drawing.writer.version):
            self.lines.add(line)
        self.number, self.spans = number, (begin, self.lines.size())

    def _worthy(self, number: int, prompts: list[int]) -> list[Worth]:
        """The answers to a step's prompts; prompts of which nothing is learned give way to others, some times."""
        self.drawing.writer.renew(number * self.node.rollout.reuse)
        with self.job.run.stop.at_once("while answers are drawn"):  # all ranks ask together whether to stop
            return self._drawn(number, prompts)

    def _drawn(self, number: int, prompts: list[int]) -> list[Worth]:
        made = self._judged(number, 0, prompts)
        for turn in range(1, self.node.rollout.redraw + 1):
            able = [worth for worth in made if self._teaches(worth)]
            lacking = len(prompts) - len(able)
            taken = {worth.prompt for worth in made}
            order = keyed(mixed(self.node.seed, number, turn), 0, len(self.asked)).tolist()
            fresh = [i for i in order if i not in taken][:lacking]
            if not lacking or not fresh:
                break
            more = self._judged(number, turn, fresh)
            rest = [worth for worth in (*more, *made) if not self._teaches(worth)]
            made = [*able, *(worth for worth in more if self._teaches(worth)), *rest][: len(prompts)]
        return made

    def _teaches(self, worth: Worth) -> bool:
        return not bool(without_signal(torch.tensor(worth.total), torch.zeros(len(worth.total)).long()).any())

    def _judged(self, number: int, turn: int, prompts: Sequence[int]) -> list[Worth]:
        """Answers with their rewards: each rank draws its share of them, the main one judges all."""
        job, how = self.job, self.node.rollout
        ranks = job.run.ranks
        mine = list(prompts[ranks.rank :: ranks.world])
        asks = self.asked, mine, how, self.node.data.max_length, seeds(self.node.seed, number, turn, mine)
        if self.environment is None or self.speech is None:
            own = draw(self.drawing.writer, *asks, self.ends)
        else:
            own = converse(self.drawing.writer, *asks, self.speech, self.environment)
        parts = job.run.peers.gather([[answer.told() for answer in group] for group in own])
        drawn = [[Answer.of(said) for said in parts[at % ranks.world][at // ranks.world]] for at in range(len(prompts))]
        judged = self._score(prompts, drawn) if job.run.main else None
        total, each = job.run.peers.share(None if judged is None else [judged.total, judged.each])
        made, at = list[Worth](), 0
        for prompt, group in zip(prompts, drawn, strict=True):
            here, given = slice(at, at + len(group)), [answer.given for answer in group]
            told = {name: list(x[here]) for name, x in each.items()}
            told |= {"environment": given} if self.environment is not None else {}
            made.append(Worth(prompt, group, [x + y for x, y in zip(total[here], given, strict=True)], told))
            at += len(group)
        return made

    def _score(self, prompts: Sequence[int], drawn: Sequence[Sequence[Answer]]) -> Scores:
        with self.job.run.peers.alone("data"):
            return score(self.node.reward, samples(self.asked, prompts, drawn), self.bench)

    def _bare(self) -> Rolled:
        """The answers as examples, before it is known what they teach."""
        drop = self.node.rollout.drop_unended
        ids = [[answer.ids for answer in worth.answers] for worth in self.held]
        weights = [
            [answer.weights(0.0 if drop and not answer.ended else 1.0) for answer in worth.answers]
            for worth in self.held
        ]
        tokens = [sum(map(sum, own)) for own in weights]
        heads = [worth.answers[0].prompt_ids for worth in self.held]
        shares = [self.node.loss.count(len(group), n) for group, n in zip(ids, tokens, strict=True)]
        if not sum(shares):  # of a step of which nothing is learned
            shares[0] = 1.0
        prompts = [worth.prompt for worth in self.held]
        return rolled(self.asked, prompts, ids, weights, shares, heads if all(heads) else ())

    def _known(self, bare: Rolled) -> tuple[list[list[float]] | None, list[list[float]] | None]:
        """The log-probabilities of all tokens by the policy as it is now and by its reference, where they are needed:
        by the forward and in the batches of training."""
        loss, priced = self.node.loss, self.node.loss.beta > 0
        old = self.node.rollout.reuse > 1 or (priced and loss.penalty == "reward")
        made = list[list[list[float]] | None]()
        for wanted, frozen in ((old, False), (priced, True)):
            made.append(self._scored(bare, frozen) if wanted else None)
        return made[0], made[1]

    def _scored(self, bare: Rolled, reference: bool) -> list[list[float]]:
        """Of each completion the log-probabilities of its tokens; 0 where they have no weight."""
        found = np.zeros(len(bare.ids), np.float64)
        placed = replace(bare, each={"place": np.arange(len(bare.ids))})
        needs = Needs(by_weight=False, temperature=self.node.rollout.temperature)
        share = self.subject.share
        for batch in self._batches(placed):
            with torch.no_grad(), self.subject.autocast():
                logps = self._reference(batch, needs) if reference else self.subject.scored(batch, needs)
            if batch.branches is not None:
                found[batch.branches.each["place"].cpu().numpy()] = logps.float().cpu().numpy()
        if share.count > 1:
            parts = share.gather([[int(i), float(found[i])] for i in np.flatnonzero(found)])
            for i, value in (pair for part in parts for pair in part):
                found[i] = value
        spans = [span for i in range(len(bare)) for span in bare.completions(i)]
        return [found[a:b].tolist() for a, b in spans]

    def _reference(self, batch: Batch, needs: Needs) -> Any:
        """By the second model, or by the first without its adapter: through its own forward, where a strategy that has
        cut it sees to its weights."""
        if self.second is not None:
            return self.second(batch, needs)
        with resting(self.subject.scored), without_adapter(self.built.model):
            return self.subject.scored(batch, needs)

    def _batches(self, made: Rolled) -> Iterator[Any]:
        support, node, share = self.built.loaded.support, self.node, self.subject.share
        packing = node.data.packing if support.packed else NoPacking()
        rows, size = range(len(made)), node.row_tokens
        make = partial(micro_batches, made, rows, packing, size, self.job.choice.rows, support.packed)
        yield from make(self.job.run.device, share.index, share.count, support.tree)

    def _taught(self, old: list[list[float]] | None, reference: list[list[float]] | None) -> Rolled:
        """The answers with what they teach."""
        bare, loss, answers = self._bare(), self.node.loss, [a for worth in self.held for a in worth.answers]
        groups = [at for at, worth in enumerate(self.held) for _ in worth.answers]
        rewards = [x for worth in self.held for x in worth.total]
        own = [np.asarray(bare.weights)[a:b].tolist() for i in range(len(bare)) for a, b in bare.completions(i)]
        made: Learned = learned(loss, loss.advantage, rewards, groups, old, reference, own)
        per = made.per | {"reward": rewards, "length": [float(len(answer.ids)) for answer in answers]}
        if self.environment is not None:
            per["calls"] = [float(sum(one["role"] == "tool" for one in answer.turns)) for answer in answers]
        per["unended"] = [float(not answer.ended) for answer in answers]
        for name in self.held[0].each:
            per[f"reward.{name}"] = [x for worth in self.held for x in worth.each[name]]
        engine = [[np.nan if x is None else x for x in answer.logps] for answer in answers]
        each = made.each | {"engine": engine}
        each |= {"old": old} if old is not None and self.node.rollout.reuse > 1 else {}
        each |= {"reference": reference} if reference is not None else {}
        whole = {name: spread_out(bare, values) for name, values in each.items()}
        return replace(bare, per=figures(per), each=whole)

    def _restore(self, number: int) -> None:
        """The rollout that an interrupted run was in the midst of.

        Raises:
            DataError: the file does not hold it.
        """
        lines = [line for line in self.lines.read() if line["rollout"] == number]
        if not lines:
            what = f"holds nothing of rollout {number}, in whose midst the checkpoint was made"
            raise DataError(what, fix="go on from a checkpoint between two rollouts", file=str(self.lines.path))
        self.held = [_worth([line for line in lines if line["group"] == at]) for at in range(lines[-1]["group"] + 1)]
        old, reference = ([line[name] for line in lines] for name in ("old", "reference"))
        self.made = self._taught(None if None in old else old, None if None in reference else reference)
        self.number = number


def _worth(lines: Sequence[Mapping[str, Any]]) -> Worth:
    each = {name: [line["rewards"][name] for line in lines] for name in lines[0]["rewards"]}
    return Worth(lines[0]["prompt"], [Answer.of(line) for line in lines], [line["reward"] for line in lines], each)


def told(
    number: int,
    asked: Asked,
    held: Sequence[Worth],
    made: Rolled,
    old: list[list[float]] | None,
    reference: list[list[float]] | None,
    version: int | None,
) -> Iterator[dict[str, Any]]:
    """A line for each answer; `version`: of the weights that drew it."""
    advantages = made.per.get("advantage")
    at = 0
    for group, worth in enumerate(held):
        file, line = asked.places[worth.prompt]
        for i, answer in enumerate(worth.answers):
            yield {
                "rollout": number,
                "version": version,
                "group": group,
                "prompt": worth.prompt,
                "row": f"{file}:{line}",
                **answer.told(),
                "reward": worth.total[i],
                "rewards": {name: x[i] for name, x in worth.each.items()},
                "advantage": None if advantages is None else float(advantages[at]),
                "old": None if old is None else old[at],
                "reference": None if reference is None else reference[at],
            }
            at += 1


@contextmanager
def rolling(job: Job, built: Built, steps: Steps) -> Iterator[Feed]:
    """The feed of a policy stage; what it holds open is closed behind it."""
    node = job.node
    if not isinstance(node, Policy):
        raise TypeError("rollouts are of a policy stage")
    with ExitStack() as stack:
        bench = stack.enter_context(Bench(job.run.grants, job.run.device))
        if job.run.main:
            score(node.reward, [], bench)  # what is missing is told now
        drawn = stack.enter_context(drawing(job, node, built, steps))
        second = None
        if node.loss.beta and isinstance(node.reference, Second):
            second = loaded(node, node.reference.path or node.model, job.run)
        yield Rolling(job, built, steps, drawn, bench, second)
