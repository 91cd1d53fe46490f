"""A context against each sequence alone: logits and gradients, in fp64 throughout.

A context must give what transformers' own eager attention gives each sequence alone. In fp64 equal means 1e-10 of the
largest value, and rounding cannot hide or feign a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmkit.core.types import Packed, Paged, Segment, Span, Tree
from llmkit.models.attend import Context, install
from llmkit.models.paged import BlockStore

BAR = 1e-10
"""Largest difference that is none, relative to the largest value."""
FLAT = 1e-5
"""A gradient that is smaller than this part of the largest of the model counts as if it were as large."""


class Doubled(TorchFunctionMode):
    """Computes in fp64 what transformers casts to fp32: norms, rotations, routers, softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        kwargs = {key: _doubled(value) for key, value in (kwargs or {}).items()}
        return func(*map(_doubled, args), **kwargs)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclass(frozen=True)
class Case:
    """One row under a context, and the sequences that it stands for: `paths` are indices into `tokens`."""

    tokens: Tensor
    positions: Tensor
    context: Context
    paths: tuple[tuple[int, ...], ...]


def packed_case() -> Case:
    """Sequences of 11, 1 and 7 tokens and one token of padding; windows are 4."""
    ends = [0, 11, 12, 19]
    spans = list(pairwise(ends))
    positions = [place for start, end in spans for place in range(end - start)] + [0]
    segments = tuple(Segment(0, start, end) for start, end in spans)
    return _case(positions, Packed(segments), [range(*span) for span in spans])


def tree_case() -> Case:
    """A prefix of 5, branches of 7 and of 1 token, and a branch of 3 on the first."""
    segments = (Segment(0, 0, 5), Segment(0, 5, 12, 0), Segment(0, 12, 13, 0), Segment(0, 13, 16, 1))
    positions = [*range(12), 5, 12, 13, 14]
    return _case(positions, Tree(segments), [[*range(12), 13, 14, 15], [*range(5), 12]])


def _case(positions: list[int], context: Context, paths: Sequence[Sequence[int]]) -> Case:
    drawn = torch.randint(3, 64, (len(positions),), generator=torch.Generator().manual_seed(1))
    return Case(drawn, torch.tensor(positions), context, tuple(tuple(path) for path in paths))


def contexted(model: Any, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (T, V) of the row under its context, and the gradients of their sum by fixed random factors."""
    out = model(input_ids=case.tokens[None], position_ids=case.positions[None], attend=case.context).logits[0]
    used = sorted({place for path in case.paths for place in path})
    (out * _factors(out.shape[0], out))[used].sum().backward()
    return out.detach(), _taken(model)


def alone(model: Any, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from each path run alone; tokens that paths share count once."""
    seen: set[int] = set()
    total: Tensor | None = None
    for path in case.paths:
        out = model(input_ids=case.tokens[list(path)][None], use_cache=False).logits[0]
        total = out.new_zeros(len(case.tokens), out.shape[1]) if total is None else total
        total[list(path)] = out.detach()
        new = [place for place in path if place not in seen]
        here = [path.index(place) for place in new]
        (out[here] * _factors(len(case.tokens), out)[new]).sum().backward()
        seen.update(path)
    if total is None:
        raise ValueError("a case has at least one path")
    return total, _taken(model)


def cached(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of two sequences with a common first block, in chunks and with a decode step; and of each alone."""
    case = _case([0] * 16, Packed(()), [])
    first, second = case.tokens[:9], torch.cat([case.tokens[:4], case.tokens[9:16]])
    store, blocks = BlockStore(8, 4), ((5, 0, 7), (5, 2, 6))
    made: list[list[Tensor]] = [[], []]
    for steps in (((0, 0, 6),), ((0, 6, 8), (1, 4, 10)), ((0, 8, 9), (1, 10, 11))):
        at = [0, *accumulate(end - start for _, start, end in steps)]
        spans = tuple(Span(0, a, b, s[1], blocks[s[0]]) for (a, b), s in zip(pairwise(at), steps, strict=True))
        row = torch.cat([(first, second)[which][start:end] for which, start, end in steps])
        places = torch.cat([torch.arange(start, end) for _, start, end in steps])
        out = model(input_ids=row[None], position_ids=places[None], attend=Paged(store, spans)).logits[0]
        for (which, _, _), span in zip(steps, spans, strict=True):
            made[which].append(out[span.start : span.end])
    model.set_attn_implementation("eager")
    whole = [model(input_ids=tokens[None], use_cache=False).logits[0] for tokens in (first, second)]
    return torch.cat([*made[0], *made[1]]), torch.cat([whole[0], whole[1][4:]])


def _factors(length: int, like: Tensor) -> Tensor:
    return torch.randn(length, like.shape[1], generator=torch.Generator().manual_seed(2)).to(like.dtype)


def _taken(model: Any) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def off(a: Tensor, b: Tensor, least: float = 1e-30) -> float:
    """The largest difference, relative to the largest value of `b`, or to `least` where that is less."""
    return float(((a - b).abs().max() / b.abs().max().clamp(min=least)).detach())


def worst(model: Any, case: Case, owner: Any = None) -> tuple[float, float]:
    """How far a context is from its paths alone: logits, and the worst gradient. `owner` is the model in a wrapper."""
    owner = model if owner is None else owner
    used = sorted({place for path in case.paths for place in path})
    with Doubled():
        owner.set_attn_implementation("eager")
        logits, grads = alone(model, case)
        install(owner, "sdpa")
        ours, our_grads = contexted(model, case)
    if grads.keys() != our_grads.keys():
        return off(ours[used], logits[used]), float("inf")
    # a bias of keys moves nothing, so that its gradient is a rounding of 0
    least = FLAT * max(float(grad.abs().max()) for grad in grads.values())
    return off(ours[used], logits[used]), max(off(our_grads[name], grads[name], least) for name in grads)


def exact(model: Any) -> Any:
    """The model in fp64; its experts one by one, because grouped products know no fp64."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.double()
