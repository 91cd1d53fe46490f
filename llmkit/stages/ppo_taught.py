"""What answers teach under `kind: ppo`: by a critic's values an advantage and a return for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from llmkit.build.training import Built
from llmkit.core.types import Batch
from llmkit.data.asked import Asked
from llmkit.data.feed import Feed
from llmkit.data.rolled import Rolled
from llmkit.parallel.steps import Steps
from llmkit.rl.valued import divergences, valued
from llmkit.stages.job import Job
from llmkit.stages.likelihoods import Likelihoods, logps_of
from llmkit.stages.ppo import Ppo
from llmkit.stages.rolling import rolling
from llmkit.stages.worth import Known, Worth, bare, lessons, weights_of


class PpoTaught:
    """The `Teaching` of PPO. What it keeps is the price of the divergence: that of the last rollout, and what followed
    from that rollout for the next one."""

    names = ("old", "value", "reference")

    def __init__(self, node: Ppo, asked: Asked, likelihoods: Likelihoods) -> None:
        self.node, self.asked, self.likelihoods = node, asked, likelihoods
        self.price = self.next = node.kl.beta

    def known(self, held: Sequence[Worth]) -> Known:
        """By policy and critic as they are now, in one forward, and by the reference where it costs anything. A new
        rollout begins with that."""
        self.price, made = self.next, self._bare(held, False)  # what was cut short drifts too
        old, values = self.likelihoods.both(made, self._said, 2)
        return {
            "old": old,
            "value": values,
            "reference": self.likelihoods.reference(made) if self.node.priced else None,
        }

    def taught(self, held: Sequence[Worth], known: Known) -> Rolled:
        """The answers with what each token teaches."""
        made, rewards = self._bare(held), [x for worth in held for x in worth.total]
        old, values, reference = known["old"], known["value"], known["reference"]
        if old is None or values is None:
            raise TypeError("answers that no policy and no critic has seen")
        apart = None if reference is None else divergences(self.node.kl.estimate, old, reference)
        lesson = valued(self.node.gae, self.price, apart, rewards, values, weights_of(made))
        mean = 0.0 if apart is None else float(np.mean([sum(one) for one in apart]))
        self.next = self.node.kl.after(self.price, mean, len(rewards))
        return lessons(made, held, lesson, known, self.node.rollout.environment is not None)

    def state(self, again: bool) -> dict[str, Any]:
        """The price of the rollout that is taught next."""
        return {"price": self.price if again else self.next}

    def begin(self, state: Mapping[str, Any]) -> None:
        """Goes on with that price."""
        self.price = self.next = float(state.get("price", self.node.kl.beta))

    def _said(self, batch: Batch) -> tuple[Tensor, ...]:
        said = self.likelihoods.subject.scored(batch, self.likelihoods.needs)
        return logps_of(said.policy), said.values

    def _bare(self, held: Sequence[Worth], drop: bool = True) -> Rolled:
        return bare(self.asked, held, drop and self.node.rollout.drop_unended, lambda completions, tokens: tokens)


def ppo_feed(job: Job, built: Built, steps: Steps) -> AbstractContextManager[Feed]:
    """The feed of a PPO stage."""
    node = job.node
    if not isinstance(node, Ppo):
        raise TypeError("a PPO stage has this feed")
    return rolling(job, node, built, steps, partial(PpoTaught, node))
