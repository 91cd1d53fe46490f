"""What answers teach under `kind: policy`: advantages, and the log-probabilities that its losses ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from llmkit.build.training import Built
from llmkit.data.asked import Asked
from llmkit.data.feed import Feed
from llmkit.data.rolled import Rolled, figures, spread_out
from llmkit.parallel.steps import Steps
from llmkit.rl.learned import Learned, learned
from llmkit.rl.objective import OverRollouts
from llmkit.stages.job import Job
from llmkit.stages.likelihoods import Likelihoods
from llmkit.stages.measured import subject
from llmkit.stages.policy import Policy
from llmkit.stages.reference import Second
from llmkit.stages.referring import loaded
from llmkit.stages.rolling import rolling
from llmkit.stages.worth import Known, Worth, bare, figured


class PolicyTaught:
    """The `Teaching` of a policy: of each group which answers were better."""

    names = ("old", "reference")

    def __init__(self, node: Policy, asked: Asked, likelihoods: Likelihoods) -> None:
        self.node, self.asked, self.likelihoods = node, asked, likelihoods

    def known(self, held: Sequence[Worth]) -> Known:
        """By the policy as it is now and by its reference, where they are needed."""
        loss, made = self.node.loss, self._bare(held, False)  # what was cut short has its price too
        priced = loss.beta > 0
        old = self.node.rollout.steps > 1 or (priced and loss.penalty == "reward")
        return {
            "old": self.likelihoods.policy(made) if old else None,
            "reference": self.likelihoods.reference(made) if priced else None,
        }

    def taught(self, held: Sequence[Worth], known: Known) -> Rolled:
        """The answers with their advantages."""
        made, loss, answers = self._bare(held), self.node.loss, [a for worth in held for a in worth.answers]
        whole = self._bare(held, False)
        old, reference = known["old"], known["reference"]
        groups = [at for at, worth in enumerate(held) for _ in worth.answers]
        rewards = [x for worth in held for x in worth.total]
        own = [np.asarray(whole.weights)[a:b].tolist() for i in range(len(whole)) for a, b in whole.completions(i)]
        lesson: Learned = learned(loss, loss.advantage, rewards, groups, old, reference, own)
        engine = [[np.nan if x is None else x for x in answer.logps] for answer in answers]
        each = lesson.each | {"engine": engine}
        each |= {"old": old} if old is not None and self.node.rollout.steps > 1 else {}
        each |= {"reference": reference} if reference is not None else {}
        per = lesson.per | figured(held, self.node.rollout.environment is not None)
        spread = {name: spread_out(made, values) for name, values in each.items()}
        return replace(made, per=figures(per), each=spread)

    def state(self, again: bool) -> dict[str, Any]:
        """Nothing that is kept."""
        return {}

    def begin(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on with."""

    def _bare(self, held: Sequence[Worth], drop: bool = True) -> Rolled:
        return bare(self.asked, held, drop and self.node.rollout.drop_unended, self.node.loss.count)


@contextmanager
def policy_feed(job: Job, built: Built, steps: Steps) -> Iterator[Feed]:
    """The feed of a policy stage; what it holds open is closed behind it."""
    node, train = job.node, job.train
    if not isinstance(node, Policy) or not isinstance(train, Asked):
        raise TypeError("rollouts are of prompts, in a policy stage")

    def teach() -> PolicyTaught:
        second, needs = None, OverRollouts(node.judge, node.rollout.temperature).needs
        if node.loss.beta and isinstance(node.reference, Second):
            second = loaded(node, node.reference.path or node.model, job.run)
        return PolicyTaught(node, train, Likelihoods(job, node, built, subject(job, built, steps), second, needs))

    with rolling(job, node, built, steps, teach) as feed:
        yield feed
