"""Expert parallelism: ranks that see different rows share the experts of a mixture model, and tokens travel to theirs.

Which tensors have a first dimension of experts, and which modules get tokens with what the router chose for them,
transformers says (`base_model_ep_plan`), read as data. A rank keeps its experts' part of those tensors, as plain
parameters, and the module's own forward runs over them: what is sent to it, one row for each token and expert, comes
from all ranks (GShard, arXiv:2006.16668; without any capacity, so that no token is dropped and nothing is padded).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.core.deferred import Deferred
from llmkit.parallel.cuts import deal, joined
from llmkit.parallel.tensor import Layout, Place

HELD, SENT = "grouped_gemm", "ep_dispatch_experts"
"""transformers' names: a tensor whose first dimension are experts, and the module that is given tokens."""


def cut(base: nn.Module, plan: Mapping[str, str], place: Place, deferred: Deferred = Deferred()) -> Layout:
    """Leaves of a loaded model of transformers, perhaps with LoRA on it, the experts of `place`. What cannot be dealt
    out stays whole."""
    layout = Layout(place, deferred)
    for path, module in _given(base, plan):
        wrappers, experts = _inside(module)
        keys = [key for key in _held(path, plan) if isinstance(getattr(experts, key, None), Tensor)]
        if why := _odd(experts, keys, wrappers, place.count):
            layout.whole[path] = why
            continue
        dealt = deal(place.count, experts.num_experts)
        for key in keys:
            layout.cut(experts, key, 0, cast(Any, dealt))
        for wrapper in wrappers:
            _low(layout, wrapper)
        layout.hooks.append(Sent(experts, wrappers, place))
    return layout


def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(re.escape(glob).replace(r"\*", r"\d+"))


def _given(base: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are given tokens, by path."""
    patterns = [_pattern(glob) for glob, style in plan.items() if style == SENT]
    for path, module in list(base.named_modules()):
        if any(pattern.fullmatch(path) for pattern in patterns):
            yield path, module


def _held(path: str, plan: Mapping[str, str]) -> list[str]:
    """What of a module the plan says to be a tensor of experts."""
    found = [glob.rpartition(".") for glob, style in plan.items() if style == HELD]
    return [key for parent, _, key in found if _pattern(parent).fullmatch(path)]


def _inside(module: Any) -> tuple[list[Any], Any]:
    """peft's wrappers around a module of experts, each for one of its tensors, and the module."""
    wrappers = []
    while hasattr(module, "base_layer"):
        wrappers.append(module)
        module = module.base_layer
    return wrappers, module


def _odd(experts: Any, keys: list[str], wrappers: list[Any], count: int) -> str:
    """Why a module of experts stays whole, if it does."""
    number = getattr(experts, "num_experts", 0)
    if not keys or not number:
        return "the plan does not speak of its tensors"
    if other := next((key for key in keys if getattr(experts, key).shape[0] != number), ""):
        return f"{other} has no row for each of its {number} experts"
    if number % count:
        return f"its {number} experts cannot be dealt out to {count} ranks"
    if wrappers and number == count and getattr(experts, "is_transposed", False):
        return "peft lays LoRA on a single expert the other way round"
    return ""


def _low(layout: Layout, wrapper: Any) -> None:
    """Cuts LoRA on a tensor of experts: rows of A lie expert by expert, columns of B rank by rank of the factors."""
    number, count = wrapper.num_experts, layout.place.count
    for name, down in wrapper.lora_A.items():
        rank, up = wrapper.r[name], wrapper.lora_B[name]
        layout.cut(down, "weight", 0, cast(Any, deal(count, number, rank)), low=True)
        columns = joined([deal(count, number, 1, k * number) for k in range(rank)])
        layout.cut(up, "weight", 1, cast(Any, columns), low=True)


class Sent:
    """Takes the place of the forward of a module of experts, whose tensors hold those of this rank: tokens go to the
    ranks of their experts, and what these made of them comes back."""

    def __init__(self, experts: Any, wrappers: list[Any], place: Place) -> None:
        self.counted, self.place, self.number = [experts, *wrappers], place, experts.num_experts
        self.compute, self.here = experts.forward, self.number // place.count
        """What a rank's experts make of tokens, by local numbers; and how many they are."""
        for module in self.counted:
            module.num_experts = self.here
        experts.forward = self

    def remove(self) -> None:
        """The module is as it was, but for its tensors."""
        del self.counted[0].forward
        for module in self.counted:
            module.num_experts = self.number

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, K) numbers of experts and (T, K) weights -> (T, H): each token's sum over its experts."""
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.number).view(self.place.count, self.here)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self.place.group)
        give, take = counts.sum(1).tolist(), coming.sum(1).tolist()
        rows = _move(hidden_states[order // top_k_index.shape[-1]], give, take, self.place.group)
        made = self._made(rows, coming)
        back = _move(made, take, give, self.place.group)[order.argsort()]
        weighted = back.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden_states.dtype)

    def _made(self, rows: Tensor, coming: Tensor) -> Tensor:
        """Of rows that lie by sender and, of each, by expert. Where there are none, experts see a row of zeros, so that
        every rank's backward pass reaches its parameters and the exchange."""
        if not len(rows):
            return self._run(rows.sum(0, keepdim=True), coming.new_zeros(1))[:0]
        local = torch.arange(self.here, device=rows.device).repeat(self.place.count)
        return self._run(rows, local.repeat_interleave(coming.view(-1)))

    def _run(self, rows: Tensor, local: Tensor) -> Tensor:
        made: Tensor = self.compute(rows, local[:, None], rows.new_ones(len(rows), 1))
        return made


def _move(rows: Tensor, give: list[int], take: list[int], group: Any) -> Tensor:
    """Sends the first `give[0]` rows to the first rank, and so on; gives what comes, `take[i]` from rank i."""
    return cast(Tensor, cast(Any, _Moved).apply(rows, give, take, group))


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, give: list[int], take: list[int], group: Any) -> Tensor:
        ctx.way = give, take, group
        return _sent(rows, give, take, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        give, take, group = ctx.way
        return _sent(grad, take, give, group), None, None, None


def _sent(rows: Tensor, give: list[int], take: list[int], group: Any) -> Tensor:
    made = rows.new_empty(sum(take), *rows.shape[1:])
    dist.all_to_all_single(made, rows.contiguous(), take, give, group=group)
    return made
