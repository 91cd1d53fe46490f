"""Whether a model can be dealt out to ranks, from its sizes alone: before any process group is formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.core.shape import EXPERTS

HEADS = ("num_attention_heads", "n_head", "num_heads")
KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout")
INNER = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")


def check_tensor(config: Mapping[str, Any], tensor: int, key: str = "parallel.tensor") -> None:
    """Sees to it that heads and inner units can be dealt out to `tensor` ranks: query heads evenly, key-value heads
    evenly or each to as many ranks. `key` is the setting that asks for it.

    Raises:
        RecipeError: they cannot; it names the numbers that fit.
    """
    text = config.get("text_config") or config
    if odd := _dropout(text):
        what = f"the model's {odd} draws for heads that lie on other ranks, which would all draw the same"
        raise RecipeError(what, fix=f"set {key}=1", key=key)
    heads, keys = _first(text, HEADS), _first(text, KEYS)
    inner = {name: text[name] for name in INNER if _whole(text.get(name))}
    if not heads or _fits(tensor, heads, keys, inner):
        return
    fit = [n for n in range(1, heads + 1) if _fits(n, heads, keys, inner)]
    said = [f"{heads} heads", f"{keys} key-value heads" if keys and keys != heads else ""]
    said += [f"{name} {value}" for name, value in inner.items()]
    what = f"{tensor} ranks cannot share {', '.join(filter(None, said))} of {text.get('model_type', 'it')} evenly"
    raise RecipeError(what, fix=f"use {_listed(fit)}", key=key)


def check_context(config: Mapping[str, Any], method: str, context: int, tensor: int = 1) -> None:
    """Sees to it that attention can go over rows that `context` ranks hold: `ulysses` deals out the query heads that
    are left on each of `tensor` ranks. Key-value heads are repeated where they do not divide, and a ring takes any.

    Raises:
        RecipeError: it cannot; it names the numbers that fit.
    """
    text = config.get("text_config") or config
    if odd := _dropout(text):
        what = f"the model's {odd} would be drawn anew by each rank that holds a part of a row"
        raise RecipeError(what, fix="set parallel.context=1", key="parallel.context")
    heads = _first(text, HEADS) // tensor
    if method != "ulysses" or heads % context == 0:
        return
    fit = _listed([n for n in range(1, heads + 1) if heads % n == 0])
    what = f"ulysses deals heads out, and {context} ranks cannot share {heads} of {text.get('model_type', 'it')} evenly"
    raise RecipeError(what, fix=f"use {fit}, or set parallel.context_method=ring or auto", key="parallel.context")


def _dropout(text: Mapping[str, Any]) -> str:
    """The dropout of attention that a configuration asks for, or nothing."""
    return next((f"{key} {text[key]}" for key in DROPOUT if text.get(key)), "")


def check_experts(config: Mapping[str, Any], expert: int, planned: bool | None) -> None:
    """Sees to it that a model's experts can be dealt out to `expert` ranks evenly; `planned` is whether transformers
    says how, None where that is not known yet.

    Raises:
        RecipeError: they cannot; it names the numbers that fit.
    """
    text = config.get("text_config") or config
    kind, number = text.get("model_type", "it"), _first(text, EXPERTS)
    if number <= 1 and not planned:
        raise RecipeError(f"{kind} has no experts to share", fix="set parallel.expert=1", key="parallel.expert")
    if planned is False:
        what = f"transformers has no plan for the experts of {kind} on several ranks"
        raise RecipeError(what, fix="set parallel.expert=1", key="parallel.expert")
    if number % expert:
        fit = [n for n in range(1, number + 1) if number % n == 0]
        what = f"{expert} ranks cannot share the {number} experts of {kind} evenly"
        raise RecipeError(what, fix=f"use {_listed(fit)}", key="parallel.expert")


def stages_of(counts: Sequence[int], tail: int, stages: int) -> list[int]:
    """The stage of each layer, in order and at least one for each, so that the sum of squares of the stages' parameters
    is the least. `counts` are those of the layers and `tail` those of the head, which the last stage has too; the
    embeddings, which are looked up, count for nothing.

    Raises:
        RecipeError: there are more stages than layers.
    """
    if len(counts) < stages:
        what = f"{stages} stages cannot share {len(counts)} layers"
        raise RecipeError(what, fix=f"use at most {len(counts)}", key="parallel.pipeline")
    ends = [0, *accumulate(counts)]
    nowhere = (float("inf"), list[int]())
    best: list[tuple[float, list[int]]] = [(0.0, []), *[nowhere] * len(counts)]
    for stage in range(stages):
        more = tail if stage == stages - 1 else 0
        made = [nowhere] * (len(counts) + 1)
        for end in range(stage + 1, len(counts) + 1):
            cost, at = min((best[at][0] + float(ends[end] - ends[at] + more) ** 2, at) for at in range(stage, end))
            made[end] = (cost, [*best[at][1], *[stage] * (end - at)])
        best = made
    return best[-1][1]


def _listed(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _fits(n: int, heads: int, keys: int, inner: Mapping[str, int]) -> bool:
    shared = not keys or keys % n == 0 or n % keys == 0
    return heads % n == 0 and shared and all(size % n == 0 for size in inner.values())


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((int(text[name]) for name in names if _whole(text.get(name))), 0)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
