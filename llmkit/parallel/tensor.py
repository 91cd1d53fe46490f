"""Tensor parallelism: every rank of a group holds a part of each layer's products, and all see the same rows.

Which products, transformers says (`base_model_tp_plan`), read as data: pairs of products whose first is cut by its
outputs (`colwise`) and whose second by its inputs (`rowwise`). Between the two nothing is communicated; `regions.py`
has what happens at the borders. Weights stay plain tensors, only smaller, so that everything that computes with them
(fused linears, LoRA, kernels, attention) works as it is, and so do DDP and FSDP over other axes of the grid.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from llmkit.core.deferred import Deferred
from llmkit.parallel.cuts import Cut, Dealt, deal, joined
from llmkit.parallel.regions import AFTER, enter, leave

FIRST, LAST, WHOLE = "first", "last", "whole"
STYLES = {
    "colwise": FIRST,
    "packed_colwise": FIRST,
    "rowwise": LAST,
    "packed_rowwise": LAST,
    "moe_tp_experts": WHOLE,
    "replicated_with_grad_allreduce": WHOLE,
}
FUSED = {"qkv_proj", "gate_up_proj"}
"""Products of several parts in one, which transformers gathers: cut part by part, nothing needs to be."""
GATHERED = {"colwise_gather_output": FIRST, "rowwise_split_input": LAST}
SHARED = ("k_proj", "v_proj")
"""Products that make key-value heads, of which there may be fewer than ranks."""


@dataclass(frozen=True)
class Place:
    """One rank of the `count` that hold a model together, and their process group."""

    index: int
    count: int
    group: Any


@dataclass
class Layout:
    """How a model lies on the ranks: what is cut, and what is whole and knows a part of its gradient."""

    place: Place
    deferred: Deferred = field(default_factory=Deferred)
    """Weights that are still in their files."""
    cuts: list[tuple[Tensor, Cut]] = field(default_factory=list)
    """Weights of the model."""
    low: list[tuple[Tensor, Cut]] = field(default_factory=list)
    """Factors of adapters on them."""
    partial: list[Tensor] = field(default_factory=list)
    """Whole on every rank, and used for a part of the heads or inner units on each."""
    whole: dict[str, str] = field(default_factory=dict)
    """Regions of the plan that every rank computes whole, and why."""
    hooks: list[Any] = field(default_factory=list)
    biases: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    """Modules that add, as `AFTER`, the bias of a linear inside of them when the parts are summed."""

    def cut(self, owner: nn.Module, key: str, dim: int, dealt: Dealt, low: bool = False) -> None:
        """Keeps this rank's part of a parameter or buffer in place of the whole."""
        held = getattr(owner, key)
        made = Cut(tuple(held.shape), dim, dealt, self.place.index)
        if not self.deferred.change(held, made.of, made.held):
            held.data = made.of(held.data)
        (self.low if low else self.cuts).append((held, made))


def cut(base: nn.Module, plan: Mapping[str, str], place: Place, deferred: Deferred = Deferred()) -> Layout:
    """Leaves of a loaded model of transformers, perhaps with LoRA on it, what `place` holds; `plan` is from globs over
    its modules and parameters to transformers' names of styles. Depends on these alone.

    A region that has anything which the plan does not speak of, or whose parts cannot be dealt out, stays whole.
    """
    layout = Layout(place, deferred)
    for path, children in _regions(base, plan).items():
        parent = base.get_submodule(path)
        found = _planned(parent, children, place.count)
        if isinstance(found, str):
            layout.whole[path] = found
            continue
        _apply(layout, parent, found)
    return layout


def _regions(base: nn.Module, plan: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What a plan means in this model: module -> its children with their styles. The head and the embeddings, which are
    no pairs of products, are not among them."""
    names = [name for name, _ in (*base.named_modules(), *base.named_parameters())]
    found: dict[str, dict[str, str]] = {}
    for glob, style in plan.items():
        pattern = re.compile(re.escape(glob).replace(r"\*", r"\d+"))
        for name in filter(pattern.fullmatch, names):
            path, _, child = name.rpartition(".")
            found.setdefault(path, {})[child] = style
    return {path: said for path, said in found.items() if any("rowwise" in s for s in said.values()) and _paired(said)}


def _paired(said: Mapping[str, str]) -> bool:
    return any("colwise" in style for style in said.values())


@dataclass(frozen=True)
class Part:
    """One product of a region: the module that makes it, and how its weight is dealt out."""

    owner: nn.Module
    key: str
    role: str
    dealt: Dealt


def _planned(parent: nn.Module, children: Mapping[str, str], count: int) -> list[Part] | str:
    """The cuts of a region; or why it stays whole."""
    roles = {}
    for child, style in children.items():
        role = STYLES.get(style) or (GATHERED.get(style) if FUSED & children.keys() else None)
        if role is None:
            return f"{child} is {style}"
        roles[child] = role
    if odd := _unknown(parent, roles):
        return f"the plan does not speak of {odd}"
    if getattr(parent, "is_transposed", False) or not getattr(parent, "is_concatenated", True):
        return "its experts are laid out otherwise"
    heads, made = _heads(parent, roles), []
    for child, role in roles.items():
        if role == WHOLE:
            continue
        held = getattr(parent, child)
        weight = held if isinstance(held, Tensor) else _weight(held)
        if weight is None:
            return f"{child} is a {type(held).__name__}"
        dealt = _dealt(child, role, weight, heads, count)
        if dealt is None:
            return f"{child} cannot be dealt out to {count} ranks"
        made.append(Part(parent, child, role, dealt))
    return made


def _unknown(parent: nn.Module, roles: Mapping[str, str]) -> str:
    """A parameter of a region that is part of nothing that the plan names."""
    for name, _ in parent.named_parameters():
        if name.partition(".")[0] not in roles:
            return name
    return ""


def _weight(module: Any) -> Tensor | None:
    """The weight of a plain linear, or of one under LoRA; None of any other module."""
    inner = getattr(module, "base_layer", module)
    lora = inner is module or (hasattr(module, "lora_A") and not module.lora_magnitude_vector)
    plain = isinstance(inner, nn.Linear) and type(inner.weight) is nn.Parameter
    return cast(Tensor, inner.weight) if plain and lora else None


def _size(parent: nn.Module) -> int:
    """The width of a head; 0 of what has none."""
    return int(getattr(parent, "head_dim", 0) or getattr(parent, "head_size", 0) or 0)


def _heads(parent: nn.Module, roles: Mapping[str, str]) -> tuple[int, int]:
    """How many query heads there are, and the width of one; (0, 0) of what has none."""
    size = _size(parent)
    if not size:
        return 0, 0
    last = next(child for child, role in roles.items() if role == LAST)
    weight = _weight(getattr(parent, last))
    return (0 if weight is None else weight.shape[1] // size), size


def _dealt(child: str, role: str, weight: Tensor, heads: tuple[int, int], count: int) -> Dealt | None:
    """How the outputs of a first product, or the inputs of a last one, are dealt out: by whole heads, if any."""
    number, size = heads
    width = weight.shape[-2 if role == FIRST else -1]
    if child == "qkv_proj":
        shared = (width // size - number) // 2
        parts = ((number, 0), (shared, number * size), (shared, (number + shared) * size))
        return joined([_once(deal(count, number, size))] + [deal(count, n, size, at) for n, at in parts[1:]])
    if child == "gate_up_proj":
        half = width // 2
        return joined([_once(deal(count, half, 1, at)) for at in (0, half)])
    dealt = deal(count, width // size, size) if size else deal(count, width)
    return dealt if child in SHARED else _once(dealt)


def _once(dealt: Dealt | None) -> Dealt | None:
    """What lies on one rank each, or nothing."""
    return None if dealt is None or any(span.share > 1 for spans in dealt for span in spans) else dealt


def _apply(layout: Layout, parent: nn.Module, parts: list[Part]) -> None:
    place = layout.place
    size = _size(parent)
    if size:
        _count_heads(parent, parts, place)
    layout.hooks.append(enter(parent, place.group))
    for part in parts:
        held = getattr(part.owner, part.key)
        if isinstance(held, Tensor):
            _narrow(parent, held.shape[-1], part)
            layout.cut(part.owner, part.key, held.ndim - (2 if part.role == FIRST else 1), part.dealt)
            continue
        (_first if part.role == FIRST else _last)(layout, held, part.dealt)
        if part.role == LAST:
            layout.hooks.append(leave(held, place.group))
    if all(isinstance(getattr(parent, part.key), Tensor) for part in parts):
        layout.hooks.append(leave(parent, place.group))
    known = {id(tensor) for tensor, _ in (*layout.cuts, *layout.low)}
    layout.partial += [p for n, p in parent.named_parameters() if id(p) not in known and not n.endswith(AFTER)]


def _narrow(parent: nn.Module, width: int, part: Part) -> None:
    """Experts say how wide they are inside."""
    if part.role == LAST:
        for key in ("intermediate_dim", "intermediate_size", "expert_dim"):
            if getattr(parent, key, None) == width:
                setattr(parent, key, sum(span.length for span in part.dealt[0]))


def _count_heads(parent: Any, parts: list[Part], place: Place) -> None:
    """An attention module counts the heads that lie here; where it asks its configuration, it gets one of its own."""
    size = _size(parent)
    last = next(part for part in parts if part.role == LAST)
    heads = _length(last, place) // size
    one = next((part for part in parts if part.key in SHARED), None)
    fused = next((part for part in parts if part.key == "qkv_proj"), None)
    keys = _length(one, place) // size if one else (_length(fused, place) // size - heads) // 2 if fused else heads
    counts = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": keys, "num_kv_heads": keys}
    counts["num_key_value_groups"] = heads // keys
    for key, value in counts.items():
        if isinstance(getattr(parent, key, None), int):
            setattr(parent, key, value)
    if hasattr(parent, "config"):
        parent.config = copy.copy(parent.config)
        parent.config.num_attention_heads, parent.config.num_key_value_heads = heads, keys


def _length(part: Part, place: Place) -> int:
    return sum(span.length for span in part.dealt[place.index])


def _first(layout: Layout, module: Any, dealt: Dealt) -> None:
    """Cuts a linear by its outputs, and with it B of its LoRA."""
    inner = getattr(module, "base_layer", module)
    layout.cut(inner, "weight", 0, dealt)
    if inner.bias is not None:
        layout.cut(inner, "bias", 0, dealt)
    for up in _low(module, "lora_B"):
        layout.cut(up, "weight", 0, dealt, low=True)
    for linear in (module, inner, *_low(module, "lora_B")):
        linear.out_features = inner.weight.shape[0]


def _last(layout: Layout, module: Any, dealt: Dealt) -> None:
    """Cuts a linear by its inputs, and with it A of its LoRA; the bias is added when the parts are summed."""
    inner = getattr(module, "base_layer", module)
    layout.cut(inner, "weight", 1, dealt)
    for down in _low(module, "lora_A"):
        layout.cut(down, "weight", 1, dealt, low=True)
    for linear in (module, inner, *_low(module, "lora_A")):
        linear.in_features = inner.weight.shape[1]
    if (bias := inner.bias) is not None:
        inner.bias = None
        module.register_parameter(AFTER, bias)
        layout.biases.append((module, inner))


def _low(module: Any, name: str) -> Iterator[Any]:
    """The factors of the adapters on a linear, if there are any."""
    yield from getattr(module, name, {}).values()
