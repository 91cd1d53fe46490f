"""The recipe's `optim` node: the optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from llmkit.core.config import config, setting
from llmkit.core.errors import ModelError
from llmkit.train.optimizing import OUTER, Optimizing, Rated, parted

if TYPE_CHECKING:
    from torch.optim import Optimizer


@config
class AdamFamily(Optimizing):
    """An optimizer with two moments, or one that takes AdamW for what it leaves alone."""

    beta1: float = setting(default=0.9, least=0.0, below=1.0)
    beta2: float = setting(default=0.999, least=0.0, below=1.0)
    eps: float = setting(default=1e-8, above=0.0)

    def adamw(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """AdamW over some of the parameters."""
        import torch

        if not groups:
            return []
        made = [group.torch() for group in groups]
        return [torch.optim.AdamW(made, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)]


@config
class AdamW(AdamFamily):
    """AdamW (arXiv:1711.05101)."""

    elementwise: ClassVar[bool] = True
    kind: Literal["adamw"] = "adamw"

    def moments(self, inner: int, outer: int, width: int) -> float:
        """Two moments in 32 bits."""
        return 8.0 * (inner + outer)

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """Torch's, fused."""
        return self.adamw(groups)


@config
class AdamW8bit(AdamFamily):
    """AdamW whose moments are held in 8-bit blocks (arXiv:2110.02861), by bitsandbytes; small tensors stay 32-bit."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    working: ClassVar[int] = 6
    """Numbers in fp32 that the update of a matrix takes for each of its own."""

    def moments(self, inner: int, outer: int, width: int) -> float:
        """Two bytes, and the scales of blocks."""
        return 2.1 * (inner + outer)

    def ready(self) -> None:
        """Bitsandbytes is there."""
        _bitsandbytes(self.kind)

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """By bitsandbytes."""
        made = [group.torch() for group in groups]
        built = _bitsandbytes(self.kind).AdamW8bit
        return [built(made, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps)]


@config
class PagedAdamW8bit(AdamFamily):
    """8-bit AdamW whose moments lie in memory that CUDA moves to the host when the GPU is full (arXiv:2305.14314)."""

    device: ClassVar[str] = "cuda"
    kind: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"
    working: ClassVar[int] = 6
    """Numbers in fp32 that the update of a matrix takes for each of its own."""

    def moments(self, inner: int, outer: int, width: int) -> float:
        """As of 8-bit AdamW: they leave the device only when they must."""
        return 2.1 * (inner + outer)

    def ready(self) -> None:
        """Bitsandbytes is there."""
        _bitsandbytes(self.kind)

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """By bitsandbytes."""
        made = [group.torch() for group in groups]
        built = _bitsandbytes(self.kind).PagedAdamW8bit
        return [built(made, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps)]


@config
class Sgd(Optimizing):
    """Stochastic gradient descent with momentum."""

    elementwise: ClassVar[bool] = True
    kind: Literal["sgd"] = "sgd"
    lr: float = setting(default=1e-2, above=0.0)
    momentum: float = setting(default=0.9, least=0.0, below=1.0)
    nesterov: bool = False

    def moments(self, inner: int, outer: int, width: int) -> float:
        """The momentum, where there is one."""
        return 4.0 * (inner + outer) if self.momentum else 0.0

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """Torch's, fused."""
        import torch

        made, nesterov = [group.torch() for group in groups], self.nesterov and self.momentum > 0
        return [torch.optim.SGD(made, lr=self.lr, momentum=self.momentum, nesterov=nesterov, fused=True)]


@config
class Muon(AdamFamily):
    """Muon (arXiv:2502.16982): momentum made orthogonal, for the matrices of layers; AdamW for everything else.

    Its updates are scaled to the size of AdamW's, so that rate and decay mean the same for both.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = setting(default=0.95, least=0.0, below=1.0)
    nesterov: bool = True
    rounds: int = setting(default=5, least=1, most=20)
    """Newton-Schulz iterations of each step."""

    def moments(self, inner: int, outer: int, width: int) -> float:
        """One moment of what Muon holds, two of the rest."""
        return 4.0 * inner + 8.0 * outer

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """Torch's, beside AdamW."""
        import torch

        inner, rest = parted(groups, lambda name, p: p.ndim == 2 and not OUTER.search(name))
        if not inner:
            return self.adamw(rest)
        muon = torch.optim.Muon(
            [group.torch() for group in inner],
            lr=self.lr,
            weight_decay=0.0,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.rounds,
            adjust_lr_fn="match_rms_adamw",
        )
        return [muon, *self.adamw(rest)]


@config
class Adafactor(Optimizing):
    """Adafactor (arXiv:1804.04235): the second moment of a matrix held as its rows' and columns' means."""

    kind: Literal["adafactor"] = "adafactor"
    working: ClassVar[int] = 3
    """Numbers in fp32 that the update of a matrix takes for each of its own."""
    lr: float = setting(default=1e-2, above=0.0)
    """Relative to the size of each parameter."""
    beta2_decay: float = setting(default=-0.8, most=0.0)
    eps: float = setting(default=1e-3, above=0.0)
    """The least size that a parameter counts with."""

    def moments(self, inner: int, outer: int, width: int) -> float:
        """A number for each row and column."""
        return 8.0 * (inner + outer) / max(1, width)

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """Torch's."""
        import torch

        made = [group.torch() for group in groups]
        return [torch.optim.Adafactor(made, lr=self.lr, beta2_decay=self.beta2_decay, eps=(None, self.eps))]


@config
class LionFamily(Optimizing):
    """Lion (arXiv:2302.06675), by bitsandbytes: `built` is its class there."""

    built: ClassVar[str] = ""
    held: ClassVar[float] = 4.0
    """Bytes of a number's momentum, with the scales of blocks."""
    lr: float = setting(default=3e-5, above=0.0)
    beta1: float = setting(default=0.9, least=0.0, below=1.0)
    beta2: float = setting(default=0.99, least=0.0, below=1.0)

    def moments(self, inner: int, outer: int, width: int) -> float:
        """The momentum."""
        return self.held * (inner + outer)

    def ready(self) -> None:
        """Bitsandbytes is there."""
        _bitsandbytes(self.kind)

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """By bitsandbytes."""
        built = getattr(_bitsandbytes(self.kind), self.built)
        return [built([group.torch() for group in groups], lr=self.lr, betas=(self.beta1, self.beta2))]


@config
class Lion(LionFamily):
    """Lion (arXiv:2302.06675): the sign of an interpolated momentum, by bitsandbytes; wants a rate below AdamW's."""

    built: ClassVar[str] = "Lion"
    elementwise: ClassVar[bool] = True
    kind: Literal["lion"] = "lion"


@config
class Lion8bit(LionFamily):
    """Lion whose momentum is held in 8-bit blocks, by bitsandbytes; small tensors stay 32-bit."""

    built: ClassVar[str] = "Lion8bit"
    held: ClassVar[float] = 1.05
    kind: Literal["lion_8bit"] = "lion_8bit"


@config
class ScheduleFree(AdamFamily):
    """Schedule-free AdamW (arXiv:2405.15682): evaluations and the result take averaged weights at a constant rate."""

    constant: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    carried: ClassVar[tuple[str, ...]] = ("k", "weight_sum", "lr_max")
    kind: Literal["schedule_free"] = "schedule_free"
    lr: float = setting(default=5e-4, above=0.0)
    beta1: float = setting(default=0.9, above=0.0, below=1.0)
    """How much of the average is in the weights that gradients are taken at."""

    def moments(self, inner: int, outer: int, width: int) -> float:
        """The second moment, and the weights that are not averaged."""
        return 8.0 * (inner + outer)

    def ready(self) -> None:
        """The package schedulefree is there."""
        _schedulefree()

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """By the package of its authors."""
        made = [group.torch() for group in groups]
        return [_schedulefree()(made, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, foreach=False)]


@config
class LowRanked(AdamFamily):
    """An optimizer that keeps the moments of layers' matrices in fewer dimensions; AdamW for everything else."""

    shaping: ClassVar[tuple[str, ...]] = ("kind", "rank")
    channels: ClassVar[bool] = False
    """Directions are random, and a channel's gradient is scaled by what AdamW would do in them."""
    rank: int = setting(default=128, least=1)
    """Matrices with no side above it go to AdamW."""
    every: int = setting(default=200, least=1)
    """Steps between new projections."""
    scale: float = setting(default=1.0, above=0.0)
    """Of the update of what is projected."""

    def moments(self, inner: int, outer: int, width: int) -> float:
        """Two moments of `rank` rows, and the projection."""
        share = min(1.0, self.rank / max(1, width))
        return 8.0 * (inner * share + outer) + 4.0 * inner * share

    def split(self, groups: Sequence[Rated]) -> tuple[list[Rated], list[Rated]]:
        """What is projected, and the rest."""
        return parted(groups, lambda name, p: p.ndim == 2 and min(p.shape) > self.rank and not OUTER.search(name))

    def make(self, groups: Sequence[Rated]) -> list[Optimizer]:
        """Ours, beside AdamW."""
        from llmkit.train.low_rank import LowRank

        inner, rest = self.split(groups)
        made = [group.torch() for group in inner]
        betas = (self.beta1, self.beta2)
        ours = (
            [LowRank(made, self.lr, betas, self.eps, self.rank, self.every, self.scale, self.channels)] if made else []
        )
        return [*ours, *self.adamw(rest)]


@config
class Galore(LowRanked):
    """GaLore (arXiv:2403.03507): AdamW in the gradient's own leading directions, found anew every so many steps."""

    kind: Literal["galore"] = "galore"
    scale: float = setting(default=0.25, above=0.0)


@config
class Apollo(LowRanked):
    """APOLLO (arXiv:2412.05270): each channel's gradient scaled by what AdamW would do in random directions."""

    channels: ClassVar[bool] = True
    kind: Literal["apollo"] = "apollo"
    scale: float = setting(default=1.0, above=0.0)
    """Of the update of what is projected; about sqrt(width / rank) for a small rank."""


def _bitsandbytes(kind: str) -> Any:
    try:
        from bitsandbytes import optim
    except ImportError as missing:
        raise ModelError(
            f"{kind} needs bitsandbytes ({missing})", fix="pip install bitsandbytes", key="optim.kind"
        ) from missing
    return optim


def _schedulefree() -> Any:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as missing:
        what = f"schedule_free needs the package schedulefree ({missing})"
        raise ModelError(what, fix="pip install schedulefree", key="optim.kind") from missing
    return AdamWScheduleFree


Optim = AdamW | AdamW8bit | PagedAdamW8bit | Sgd | Muon | Adafactor | Lion | Lion8bit | ScheduleFree | Galore | Apollo

ELEMENTWISE = tuple(kind.kind for kind in get_args(Optim) if kind.elementwise)
"""Optimizers whose parameters may be cut anywhere."""
