"""What functions of the user's own give as losses is looked at: each time by its form, and before a run begins, on a
few values, for numbers that are finite and a gradient that flows."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from llmkit.core.own import Own
from llmkit.core.types import Branches, LossSum
from llmkit.losses.policy import LOGGED, Drawn
from llmkit.losses.preference import judged, ratios
from llmkit.losses.sides import Judged, Sides

OURS = {"event", "step", "epoch", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "samples", "skipped"}
OURS |= {"skipped_rows", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "loss_scale", "bubble"}
"""Names that a line of metrics has already, whatever is trained."""
REWARDS = ("reward_chosen", "reward_rejected")
"""Names of ours that a function over pairs may give instead."""
ROLLED = {*LOGGED, "reward", "length", "calls", "unended", "divergence", "penalty", "beta", "engine_gap"}
"""Names that the line of a step over answers has beside those."""
TRIED = 8
"""Pairs or tokens of which a function is asked before a run begins."""


def losses(
    own: Own, given: tuple[object, ...], like: Tensor, of: str, taken: Collection[str]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What a function gives for as many pairs or tokens (`of`) as `like` has, (N,): losses and figures, (N,) each, of
    which none has a name that is `taken`. Of none it is not asked: means of nothing are no numbers.

    Raises:
        OwnError: it fails, or gives something else.
    """
    if not len(like):
        return like - like.detach(), {}
    made = own(*given)
    figures: object = {}
    if isinstance(made, tuple) and len(made) == 2:
        made, figures = made
    if not isinstance(figures, Mapping):
        own.wrong(f"gave {type(figures).__name__} beside the losses", "return losses, or losses and a dict of figures")
    _check(own, "losses", made, like, of)
    if like.requires_grad and not made.requires_grad:
        own.wrong("gave losses without a gradient", "make them of what it is given, without detach or no_grad")
    for name, each in figures.items():
        if not isinstance(name, str) or name in OURS or name in taken:
            own.wrong(f"calls a figure {name!r}", "give it a name that is text and that metrics.jsonl has not")
        _check(own, f"figure {name}", each, like, of)
    return made, {name: each.detach() for name, each in figures.items()}


def _check(own: Own, what: str, made: object, like: Tensor, of: str) -> None:
    fix = f"return one number for each {of}, a tensor of ({len(like)},) here"
    if not isinstance(made, Tensor):
        own.wrong(f"gave {what} that are {type(made).__name__}, no tensor", fix)
    if made.shape != like.shape:
        own.wrong(f"gave {what} of shape {tuple(made.shape)} for {len(like)} {of}s", fix)
    if what == "losses" and not made.is_floating_point():
        own.wrong(f"gave {what} of {made.dtype}", fix)
    if made.device != like.device:
        own.wrong(f"gave {what} on {made.device}, of what is on {like.device}", "leave them where they are made")


def pairs(own: Own, policy: Sides, reference: Sides | None) -> Judged:
    """The losses of pairs with their figures. Rewards, where it says none, are the ratios, or without a reference the
    log-probabilities."""
    both = (policy.chosen, policy.rejected) if reference is None else ratios(policy, reference)
    ours = judged(policy.chosen, *both, policy).figures
    made, figures = losses(own, (policy, reference), policy.chosen, "pair", ours.keys() - {*REWARDS})
    chosen, rejected = (figures.get(name, ours[name]) for name in REWARDS)
    more = {name: each for name, each in figures.items() if name not in REWARDS}
    return judged(made, chosen, rejected, policy, more)


def tokens(own: Own, logps: Tensor, weights: Tensor) -> LossSum:
    """The losses of tokens by their weights, with the negative log-likelihood and figures of its own beside them."""
    made, figures = losses(own, (logps,), logps, "token", ("nll",))
    said = {"nll": -logps.detach(), **figures}
    count = weights.sum()
    return LossSum(
        (made * weights).sum(), count, {name: ((each * weights).sum(), count) for name, each in said.items()}
    )


def surrogate(own: Own, seen: Drawn) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The losses of tokens that a policy drew, with figures."""
    return losses(own, (seen,), seen.logps, "token", ROLLED)


def try_pairs(own: Own, compares: bool) -> None:
    """
    Raises:
        OwnError: what it gives of a few pairs cannot be learned from.
    """
    places = torch.linspace(-1, 1, TRIED, dtype=torch.float64)
    chosen, rejected = (-12 + 3 * places).requires_grad_(), (-13 - 2 * places).requires_grad_()
    tokens = torch.arange(3, 3 + TRIED).double()
    lengths = tokens, tokens.flip(0)
    reference = Sides(chosen.detach() - places.sin(), rejected.detach() + places.cos() - 1, *lengths)
    made = pairs(own, Sides(chosen, rejected, *lengths, chosen), reference if compares else None).losses
    _check_learned(own, made, (chosen, rejected), "the log-probabilities of chosen and rejected completions")


def try_tokens(own: Own, compares: bool) -> None:
    """
    Raises:
        OwnError: what it gives of a few tokens cannot be learned from.
    """
    of = torch.tensor([0] * 3 + [1] * 2 + [2] * (TRIED - 5))
    places = torch.linspace(-1, 1, TRIED)
    logps = (-2 + places).requires_grad_()
    each = {"old": logps.detach() - 0.1 * places.cos()}
    each |= {"reference": logps.detach() + 0.1 * places} if compares else {}
    advantages = torch.tensor([1.0, -1.0, 0.5])[of]
    branches = Branches(of, torch.zeros(3).long(), {"advantage": advantages}, each)
    given = Drawn(logps, each["old"], torch.ones(TRIED), advantages, branches, 2 + places)
    made, _ = surrogate(own, given)
    _check_learned(own, made, (logps,), "the policy's log-probabilities")


def try_logps(own: Own) -> None:
    """
    Raises:
        OwnError: what it gives of a few tokens cannot be learned from.
    """
    logps = torch.linspace(-5, -0.1, TRIED).requires_grad_()
    made = tokens(own, logps, torch.ones(TRIED)).total
    _check_learned(own, made, (logps,), "the log-probabilities")


def _check_learned(own: Own, made: Tensor, given: tuple[Tensor, ...], of: str) -> None:
    if not made.isfinite().all():
        own.wrong(f"gave {made.detach()[~made.isfinite()][0].item()} on plain values", "let it give finite numbers")
    slopes = own.run(lambda: torch.autograd.grad(made.sum(), given, allow_unused=True))
    found = [slope for slope in slopes if slope is not None]
    if not all(slope.isfinite().all() for slope in found):
        own.wrong("has a gradient that is not finite on plain values", "keep square roots and logs away from 0")
    if not any(slope.any() for slope in found):
        own.wrong(f"has no gradient with respect to {of}", "make losses of them, without detach or no_grad")
