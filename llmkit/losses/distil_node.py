"""The `loss` unions of what learns from another model's law of all words: a small model that drafts, and a student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmkit.core.config import config, setting
from llmkit.core.types import Compared, Drafted, LossSum
from llmkit.losses.draft_node import together

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.core.types import Batch
    from llmkit.losses.draft_node import Rule


@config
class ForwardKl:
    """KL(p, q) of the teacher's law p to the student's law q (Hinton et al., arXiv:1503.02531; of drafters,
    DistillSpec, arXiv:2310.08461): it covers all that the teacher may say."""

    kind: Literal["forward_kl"] = "forward_kl"

    @property
    def rule(self) -> Rule:
        """Loss and gradient of rows, over the law p."""
        from llmkit.losses.distil import forward_kl

        return forward_kl

    def divergence(self, logits: Tensor, log_law: Tensor) -> tuple[Tensor, Tensor]:
        """The same over log p."""
        return self.rule(logits, log_law.exp())

    def __call__(self, scores: Drafted, batch: Batch) -> LossSum:
        """The sum over all tokens that have a weight."""
        return together(scores, 1.0, batch.weights.sum())


@config
class KeptShare:
    """-log sum min(p, q): of how often a draft that is drawn is kept."""

    kind: Literal["overlap"] = "overlap"

    @property
    def rule(self) -> Rule:
        """Loss and gradient of rows."""
        from llmkit.losses.distil import overlap

        return overlap

    def __call__(self, scores: Drafted, batch: Batch) -> LossSum:
        """The sum over all tokens that have a weight."""
        return together(scores, 1.0, batch.weights.sum())


DistilLoss = ForwardKl | KeptShare


@config
class ReverseKl:
    """KL(q, p) of the student's law q to the teacher's law p (MiniLLM, arXiv:2306.08543): it says nothing that the
    teacher would not."""

    kind: Literal["reverse_kl"] = "reverse_kl"

    def divergence(self, logits: Tensor, log_law: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows, and its gradient by the logits of q."""
        from llmkit.losses.distil import reverse_kl

        return reverse_kl(logits, log_law)


@config
class Jsd:
    """The generalised Jensen-Shannon divergence, beta KL(p, m) + (1 - beta) KL(q, m) of m = beta p + (1 - beta) q
    (GKD, arXiv:2306.13649). Of its ends, 0 and 1, both are nothing: take forward_kl or reverse_kl."""

    kind: Literal["jsd"] = "jsd"
    beta: float = setting(default=0.5, above=0.0, below=1.0)
    """The teacher's share of the mixture."""

    def divergence(self, logits: Tensor, log_law: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows, and its gradient by the logits of q."""
        from llmkit.losses.distil import jsd

        return jsd(logits, log_law, self.beta)


StudentLoss = ForwardKl | ReverseKl | Jsd


@dataclass(frozen=True)
class Distillation:
    """The sum of a student's loss; beside it both of its parts, as they are without their shares."""

    share: float
    """Of cross-entropy to the labels."""

    def __call__(self, scores: Compared, batch: Batch) -> LossSum:
        """The sum over all tokens that have a weight; `divergence` has its factor T^2."""
        count, nll = batch.weights.sum(), scores.nll
        far = (scores.loss.detach() - self.share * nll) / (1 - self.share)
        return LossSum(scores.loss, count, {"divergence": (far, count), "nll": (nll, count)})
