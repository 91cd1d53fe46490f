"""The recipe's `loss` nodes: over tokens that are predicted, and over classes. Each is a sum with its count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

from llmkit.core.config import Conflict, config, setting
from llmkit.core.errors import RecipeError
from llmkit.core.types import LossSum, Needs, Scores
from llmkit.losses.own_node import OwnTokens

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.core.types import Batch


@config
class CrossEntropy:
    """Negative log-likelihood of the tokens that count."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = setting(default=0.0, least=0.0, below=1.0)
    """Share of the target that is spread evenly over the tokenizer's words (arXiv:1512.00567); perplexities of smoothed
    and plain training cannot be compared, so the plain loss is logged as `nll`."""
    z_loss: float = setting(default=0.0, least=0.0)
    """Factor on the square of the log of the softmax's normaliser, which holds it near 0 (arXiv:2204.02311): 1e-4."""

    @property
    def needs(self) -> Needs:
        """What it reads of the head."""
        return Needs(spread=bool(self.label_smoothing or self.z_loss))

    def __call__(self, scores: Tensor | Scores, batch: Batch) -> LossSum:
        """The sum of w (-(1 - e) log p - e mean log p + z lse^2) over the tokens that have a weight, and of w."""
        weights_N = batch.weights[batch.weights != 0]
        if not isinstance(scores, Scores):
            return LossSum(total=-(scores * weights_N).sum(), count=weights_N.sum())
        share, count = self.label_smoothing, weights_N.sum()
        each_N = (1 - share) * scores.logps + share * scores.mean - self.z_loss * scores.lse.square()
        nll = -(scores.logps.detach() * weights_N).sum()
        return LossSum(total=-(each_N * weights_N).sum(), count=count, extras={"nll": (nll, count)})


@config
class Dft:
    """Dynamic fine-tuning (arXiv:2508.05629): a token's loss counts as much as the model believes in it already."""

    kind: Literal["dft"] = "dft"

    @property
    def needs(self) -> Needs:
        """What it reads of the head."""
        return Needs(by_weight=False)

    def __call__(self, scores: Tensor | Scores, batch: Batch) -> LossSum:
        """The sum of -w p log p with p held fixed, and the sum of w."""
        logps_N, weights_N = cast("Tensor", scores), batch.weights[batch.weights != 0]
        count = weights_N.sum()
        nll = -(logps_N.detach() * weights_N).sum()
        return LossSum(-(logps_N.detach().exp() * logps_N * weights_N).sum(), count, {"nll": (nll, count)})


TokenLoss = CrossEntropy | Dft | OwnTokens


class ClassObjective(Protocol):
    """A loss over the logits of classes, (N, C)."""

    def __call__(self, scores: Tensor, batch: Batch) -> LossSum:
        """Its sum over the targets that have a weight, and the sum of the weights."""
        ...


@dataclass(frozen=True)
class Seen:
    """What a loss over classes may need to know of the training rows."""

    counts: Sequence[int]
    """Targets of each class."""
    groups: Sequence[int] = ()
    """The group of each example."""
    group_names: tuple[str, ...] = ()


@config
class ClassEntropy:
    """Negative log-likelihood of the class."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = setting(default=0.0, least=0.0, below=1.0)
    """Share of the target that is spread evenly over the classes (arXiv:1512.00567)."""

    def over(self, seen: Seen) -> ClassObjective:
        """The loss on rows such as these."""
        from llmkit.losses.classes import Entropy

        return Entropy(self.label_smoothing)


@config
class Focal:
    """Focal loss (arXiv:1708.02002): examples that are already right count less, by (1 - p)^gamma. Its probabilities
    want calibrating afterwards."""

    kind: Literal["focal"] = "focal"
    gamma: float = setting(default=2.0, least=0.0)
    """0 is cross-entropy."""
    alpha: Literal["auto"] | tuple[float, ...] | None = None
    """A factor for each class, in the order of `labels`; `auto`: rows / (classes x rows of the class)."""

    def problems(self) -> Iterator[Conflict]:
        """Factors that are none."""
        if isinstance(self.alpha, tuple) and not all(0 <= one < float("inf") for one in self.alpha):
            yield Conflict("alpha", "holds a factor below 0, or none that is finite", "give factors of 0 or more")

    def over(self, seen: Seen) -> ClassObjective:
        """The loss on rows such as these.

        Raises:
            RecipeError: `alpha` is not of as many classes.
        """
        from llmkit.losses.classes import FocalLoss

        alpha = balanced(seen.counts) if self.alpha == "auto" else self.alpha
        if alpha is not None and len(alpha) != len(seen.counts):
            what = f"has {len(alpha)} factors for {len(seen.counts)} classes"
            raise RecipeError(what, fix="give one for each of labels, or auto", key="loss.alpha")
        return FocalLoss(self.gamma, None if alpha is None else tuple(map(float, alpha)))


@config
class GroupDro:
    """Group-DRO (arXiv:1911.08731): groups of rows (column `group`) count by weights that grow with their own loss, so
    that the worst group is learned. A step uses the weights that the one before left: accumulation cannot change it."""

    kind: Literal["group_dro"] = "group_dro"
    step: float = setting(default=0.01, above=0.0)
    """How fast: a group's weight is multiplied by exp(step x its mean loss) after each optimizer step."""
    label_smoothing: float = setting(default=0.0, least=0.0, below=1.0)
    """As in cross_entropy."""

    def over(self, seen: Seen) -> ClassObjective:
        """The loss on rows such as these."""
        from llmkit.losses.classes import GroupDroLoss

        return GroupDroLoss(self.step, self.label_smoothing, tuple(seen.groups), seen.group_names)


ClassLoss = ClassEntropy | Focal | GroupDro


def balanced(counts: Sequence[int]) -> tuple[float, ...]:
    """rows / (classes x rows of the class) for each class that is there: the mean over the rows is 1."""
    total, there = sum(counts), sum(count > 0 for count in counts)
    return tuple(total / (there * count) if count else 0.0 for count in counts)
