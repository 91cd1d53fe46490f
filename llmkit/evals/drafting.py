"""How a head drafts on texts that it has not seen: what of them it makes in each step, as an engine would go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmkit.core.types import Drafted
from llmkit.data.prepare import Prepared
from llmkit.evals.run import Subject
from llmkit.evals.summed import Loss, held_out_sums


@dataclass
class Walk:
    """Steps through texts: in each the drafts that are right, and the token after them."""

    steps: int = 0
    tokens: int = 0
    """What they made."""
    kept: list[int] = field(default_factory=list)
    """Of each place among the drafts, the steps in which it was right."""

    def take(self, made: Drafted) -> None:
        """Goes through the texts of a batch. Rows of one answer follow each other; the first of them is before its
        first token, which the step that reads a prompt makes."""
        places, right = made.rows.tolist(), made.right.sum(1).tolist()
        self.kept = self.kept or [0] * made.right.shape[1]
        at = 0
        while at < len(places):
            if not at or places[at] != places[at - 1] + 1:
                at += 1
                continue
            left = next((n for n in range(len(places) - at) if places[at + n] != places[at] + n), len(places) - at)
            self.steps += 1
            self.tokens += min(right[at] + 1, left)
            for draft in range(right[at]):
                self.kept[draft] += 1
            at += min(right[at] + 1, left)


def held_out_drafts(
    subject: Subject, loss: Loss, valid: Prepared, ids: Sequence[int], capacity: int
) -> dict[str, float]:
    """The loss; tokens a step, of one chain of drafts each; how often each draft in turn is right, as a share of the
    steps; and how often one that is drawn is kept where those before it were."""
    walk = Walk()
    summed = held_out_sums(subject, loss, valid, ids, capacity, walk.take)
    figures = {"valid.loss": summed.pop("valid.loss"), "valid.tokens_per_step": walk.tokens / max(1, walk.steps)}
    figures |= {f"valid.right_{at}": kept / max(1, walk.steps) for at, kept in enumerate(walk.kept, 1)}
    return figures | summed
