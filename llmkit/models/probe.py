"""What a loaded model supports, found out by trying: two packed segments must equal the two run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from llmkit.core.types import Packed, Paged, Segment, Span, Tree
from llmkit.models.attend import NAMES, NO_MASK, Context
from llmkit.models.paged import BlockStore

MOVING_ROPE = ("dynamic", "longrope")
"""RoPE kinds whose frequencies depend on the largest position of the whole forward."""


@dataclass(frozen=True)
class Support:
    """Which contexts a model takes; `reason` says why not."""

    packed: bool
    tree: bool
    paged: bool
    reason: str = ""


def probe(model: Any) -> Support:
    """Tries the contexts on a few tokens; the model's mode and torch's random state are as before."""
    name = type(model).__name__
    if model.config.get_text_config()._attn_implementation not in NAMES.values():
        return Support(False, False, False, f"{name} brings its own attention, which knows no context")
    if kind := _moving_rope(model.config.get_text_config()):
        return Support(False, False, False, f"{name}: RoPE `{kind}` takes its frequencies from the longest segment")
    with _at_rest(model), torch.no_grad(), _counted(model) as calls:
        try:
            return _tried(model, name, calls)
        except (TypeError, ValueError, RuntimeError, IndexError) as cause:
            return Support(False, False, False, f"{name} does not take a context: {str(cause).splitlines()[0][:90]}")


def _tried(model: Any, name: str, calls: list[int]) -> Support:
    size = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    a, b, c = (_tokens(n, salt, size, device) for n, salt in ((6, 1), (5, 2), (4, 3)))
    calls[0] = 0
    alone = [run(model, t, Packed((Segment(0, 0, len(t)),))) for t in (a, torch.cat([a, b]), torch.cat([a, c]), b)]
    layers = _attention_layers(model.config.get_text_config())
    if calls[0] != 4 * layers:
        return Support(False, False, False, f"{name} keeps state outside of attention, or never asks for our attention")
    close = 2e-5 if alone[0].dtype == torch.float32 else 5e-2
    n, m = len(a), len(a) + len(b)
    both = torch.cat([a, b])
    packed = _packed_row(model, both, n, m)
    if not _equal(packed, torch.cat([alone[0], alone[3]]), close):
        return Support(False, False, False, f"{name} lets packed sequences touch outside of attention")
    branches = Tree((Segment(0, 0, n), Segment(0, n, m, 0), Segment(0, m, m + len(c), 0)))
    starts = torch.cat([torch.arange(m), torch.arange(n, n + len(c))]).to(device)
    tree = run(model, torch.cat([both, c]), branches, starts)
    tree_ok = _equal(tree, torch.cat([alone[1], alone[2][n:]]), close)
    paged = _equal(_in_blocks(model, both), alone[1], close)
    reason = "" if tree_ok and paged else f"{name} gives other values under a tree or with cached keys"
    return Support(True, tree_ok, paged, reason)


def run(model: Any, tokens: Tensor, context: Context, positions: Tensor | None = None) -> Tensor:
    """The hidden states of one row, (T, H)."""
    where = torch.arange(len(tokens), device=tokens.device) if positions is None else positions
    mask = NO_MASK.to(tokens.device)
    out = model.base_model(
        input_ids=tokens[None], position_ids=where[None], attention_mask=mask, attend=context, use_cache=False
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def _packed_row(model: Any, both: Tensor, n: int, m: int) -> Tensor:
    positions = torch.cat([torch.arange(n), torch.arange(m - n)]).to(both.device)
    return run(model, both, Packed((Segment(0, 0, n), Segment(0, n, m))), positions)


def _in_blocks(model: Any, tokens: Tensor) -> Tensor:
    """A prefill in two chunks and a last token, over blocks of 4 that do not lie in order."""
    store, blocks = BlockStore(8, 4), (5, 0, 7, 2)
    made, past = [], 0
    for chunk in tokens.split([4, len(tokens) - 5, 1]):
        where = torch.arange(past, past + len(chunk), device=tokens.device)
        made.append(run(model, chunk, Paged(store, (Span(0, 0, len(chunk), past, blocks),)), where))
        past += len(chunk)
    return torch.cat(made)


def _tokens(n: int, salt: int, size: int, device: torch.device) -> Tensor:
    return (torch.arange(1, n + 1, device=device) * 7 * salt + salt) % min(size, 1000)


def _equal(a: Tensor, b: Tensor, close: float) -> bool:
    return bool((a - b).abs().max() <= close * b.abs().max())


def _attention_layers(config: Any) -> int:
    """Layers that attend, by the configuration: recurrent and linear ones do not count."""
    kinds = getattr(config, "layer_types", None)
    return int(config.num_hidden_layers) if not kinds else len(kinds)


def _moving_rope(config: Any) -> str:
    said = getattr(config, "rope_parameters", None) or {}
    sets = [said, *(v for v in said.values() if isinstance(v, dict))]
    return next((s["rope_type"] for s in sets if s.get("rope_type") in MOVING_ROPE), "")


@contextmanager
def _at_rest(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """Counts how often the model asks for our attention."""
    calls, name = [0], model.config.get_text_config()._attn_implementation
    ours = AttentionInterface._global_mapping[name]

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += "attend" in kwargs
        return ours(*args, **kwargs)

    AttentionInterface.register(name, counting)
    try:
        yield calls
    finally:
        AttentionInterface.register(name, ours)
