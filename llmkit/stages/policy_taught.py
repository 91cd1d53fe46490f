"""What answers teach under `kind: policy`: advantages, and the log-probabilities that its losses ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from llmkit.build.training import Built
from llmkit.data.asked import Asked
from llmkit.data.feed import Feed
from llmkit.data.rolled import Rolled
from llmkit.parallel.steps import Steps
from llmkit.rl.learned import learned
from llmkit.stages.job import Job
from llmkit.stages.likelihoods import Likelihoods
from llmkit.stages.policy import Policy
from llmkit.stages.rolling import rolling
from llmkit.stages.worth import Known, Worth, bare, lessons, weights_of


class PolicyTaught:
    """The `Teaching` of a policy: of each group which answers were better."""

    names = ("old", "reference")

    def __init__(self, node: Policy, asked: Asked, likelihoods: Likelihoods) -> None:
        self.node, self.asked, self.likelihoods = node, asked, likelihoods

    def known(self, held: Sequence[Worth]) -> Known:
        """By the policy as it is now and by its reference, where they are needed."""
        made = self._bare(held, False)  # what was cut short has its price too
        return {
            "old": self.likelihoods.policy(made) if self.node.asks_old else None,
            "reference": self.likelihoods.reference(made) if self.node.priced else None,
        }

    def taught(self, held: Sequence[Worth], known: Known) -> Rolled:
        """The answers with their advantages."""
        node, groups = self.node, [at for at, worth in enumerate(held) for _ in worth.answers]
        rewards, own = [x for worth in held for x in worth.total], weights_of(self._bare(held, False))
        lesson = learned(node.loss, node.loss.advantage, rewards, groups, known["old"], known["reference"], own)
        said = {"old": known["old"] if node.rollout.steps > 1 else None, "reference": known["reference"]}
        return lessons(self._bare(held), held, lesson, said, node.rollout.environment is not None)

    def state(self, again: bool) -> dict[str, Any]:
        """Nothing that is kept."""
        return {}

    def begin(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on with."""

    def _bare(self, held: Sequence[Worth], drop: bool = True) -> Rolled:
        return bare(self.asked, held, drop and self.node.rollout.drop_unended, self.node.loss.count)


def policy_feed(job: Job, built: Built, steps: Steps) -> AbstractContextManager[Feed]:
    """The feed of a policy stage."""
    node = job.node
    if not isinstance(node, Policy):
        raise TypeError("a policy stage has this feed")
    return rolling(job, node, built, steps, partial(PolicyTaught, node))
