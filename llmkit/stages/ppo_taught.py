"""What answers teach under `kind: ppo`: by a critic's values an advantage and a return for each token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from llmkit.build.training import Built
from llmkit.core.types import Batch
from llmkit.data.asked import Asked
from llmkit.data.feed import Feed
from llmkit.data.rolled import Rolled, figures, spread_out
from llmkit.parallel.steps import Steps
from llmkit.rl.objective import OverRollouts
from llmkit.rl.valued import divergences, valued
from llmkit.stages.job import Job
from llmkit.stages.likelihoods import Likelihoods, logps_of
from llmkit.stages.measured import subject
from llmkit.stages.ppo import Ppo
from llmkit.stages.reference import Second
from llmkit.stages.referring import loaded
from llmkit.stages.rolling import rolling
from llmkit.stages.worth import Known, Worth, bare, figured


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
        made, answers = self._bare(held), [a for worth in held for a in worth.answers]
        old, values, reference = known["old"], known["value"], known["reference"]
        if old is None or values is None:
            raise TypeError("answers that no policy and no critic has seen")
        apart = None if reference is None else divergences(self.node.kl.estimate, old, reference)
        own = [np.asarray(made.weights)[a:b].tolist() for i in range(len(made)) for a, b in made.completions(i)]
        rewards = [x for worth in held for x in worth.total]
        lesson = valued(self.node.gae, self.price, apart, rewards, values, own)
        mean = 0.0 if apart is None else float(np.mean([sum(one) for one in apart]))
        self.next = self.node.kl.after(self.price, mean, len(answers))
        engine = [[np.nan if x is None else x for x in answer.logps] for answer in answers]
        each = lesson.each | {"engine": engine, "old": old, "value": values}
        each |= {"reference": reference} if reference is not None else {}
        per = lesson.per | figured(held, self.node.rollout.environment is not None)
        whole = {name: spread_out(made, column) for name, column in each.items()}
        return replace(made, per=figures(per), each=whole)

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


@contextmanager
def ppo_feed(job: Job, built: Built, steps: Steps) -> Iterator[Feed]:
    """The feed of a PPO stage; what it holds open is closed behind it."""
    node, train = job.node, job.train
    if not isinstance(node, Ppo) or not isinstance(train, Asked):
        raise TypeError("rollouts are of prompts, in a PPO stage")

    def teach() -> PpoTaught:
        second, needs = None, OverRollouts(node.loss, node.rollout.temperature).needs
        if node.priced and isinstance(node.reference, Second):
            second = loaded(node, node.reference.path or node.model, job.run)
        return PpoTaught(node, train, Likelihoods(job, node, built, subject(job, built, steps), second, needs))

    with rolling(job, node, built, steps, teach) as feed:
        yield feed
