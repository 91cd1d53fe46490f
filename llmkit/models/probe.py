"""What a loaded model supports, found out by trying: under a context it must give what transformers' eager gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from llmkit.core.memory import is_out_of_memory
from llmkit.core.types import Packed, Paged, Segment, Span, Tree
from llmkit.models.attend import NAMES, Context
from llmkit.models.paged import BlockStore
from llmkit.models.rotary import moving, turns_by_sequence

ATTENDS = ("full_attention", "sliding_attention")
"""Layer types whose only mixing of tokens is attention that our function can do."""

CLOSE, LOOSE = 2e-5, 1e-1
"""Largest norm of the difference, relative to the values': fp32; 16 bits and quantised weights."""

WATCH = "llmkit_watch"
_one_at_a_time = threading.Lock()  # probes share the name WATCH in transformers' interface


@dataclass(frozen=True)
class Support:
    """Which contexts a model takes; `reason` says why not."""

    packed: bool
    tree: bool
    paged: bool
    reason: str = ""


@dataclass
class Calls:
    """What reached our attention function: calls with a context, and how many of them named a window or a soft-cap."""

    contexts: int = 0
    windows: int = 0
    caps: int = 0


def probe(model: Any) -> Support:
    """Tries the contexts on a few tokens; the model's modes and torch's random state are as before."""
    if reason := _known_reason(model):
        return Support(False, False, False, f"{type(model).__name__} {reason}")
    devices = [model.device] if model.device.type == "cuda" else []
    with _one_at_a_time, _at_rest(model), torch.no_grad(), torch.random.fork_rng(devices):
        try:
            return _tried(model, type(model).__name__)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as cause:
            if is_out_of_memory(cause):
                raise
            said = (str(cause).splitlines() or [""])[0][:90]
            return Support(False, False, False, f"{type(model).__name__} does not run under a context: {said}")


def _known_reason(model: Any) -> str:
    """What the configuration and the modules tell before anything runs."""
    config = model.config.get_text_config()
    if config._attn_implementation not in NAMES.values():
        return "brings its own attention, which knows no context"
    kinds = list(getattr(config, "layer_types", None) or ())
    if odd := [kind for kind in kinds if kind not in ATTENDS]:
        return f"has {len(odd)} of {len(kinds)} layers of type {odd[0]}, which mixes tokens in its own way"
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            return f"keeps recurrent state: {name} mixes tokens outside of attention"
    if (kind := moving(model)) and not turns_by_sequence(model):
        return f"has RoPE `{kind}`, whose frequencies follow the longest segment"
    return ""


def _tried(model: Any, name: str) -> Support:
    config = model.config.get_text_config()
    prefix, b, c = (_tokens(n, salt, model) for n, salt in ((5, 1), (6, 2), (6, 3)))
    first, second = torch.cat([prefix, b]), torch.cat([prefix, c])
    with _switched(model, "eager"):
        alone = model.base_model(input_ids=torch.stack([first, second]), use_cache=False).last_hidden_state
    exact = alone.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    close = CLOSE if exact else LOOSE
    n = len(first)
    with _watched(model) as calls:
        segments = (Segment(0, 0, n), Segment(0, n, 2 * n))
        packed = run(model, torch.cat([first, second]), Packed(segments), [*range(n), *range(n)])
    if reason := _missed(calls, config):
        return Support(False, False, False, f"{name} {reason}")
    if not _equal(packed, alone.flatten(0, 1), close):
        return Support(False, False, False, f"{name} gives packed sequences other values than alone")
    if kind := moving(model):  # the trained length is too long to try; the tests go past it in small models
        return Support(True, False, False, f"{name} has RoPE `{kind}`: keys turn by the length of their whole sequence")
    start = len(prefix)
    branches = Tree((Segment(0, 0, start), Segment(0, start, n, 0), Segment(0, n, n + len(c), 0)))
    tree = run(model, torch.cat([first, c]), branches, [*range(n), *range(start, n)])
    tree_fits = _equal(tree, torch.cat([alone[0], alone[1][start:]]), close)
    paged_fits = _equal(_in_blocks(model, first), alone[0], close)
    missing = [word for word, fits in (("a tree", tree_fits), ("cached keys", paged_fits)) if not fits]
    return Support(True, tree_fits, paged_fits, f"{name} gives other values under {missing[0]}" if missing else "")


def _missed(calls: Calls, config: Any) -> str:
    """What did not reach our function although the configuration has it."""
    layers = int(config.num_hidden_layers)
    if calls.contexts != layers:
        return f"hands the context to {calls.contexts} of {layers} attention layers"
    kinds = getattr(config, "layer_types", None)
    windowed = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    windows = list(kinds).count("sliding_attention") if kinds else layers * windowed
    if calls.windows < windows:
        return f"names its sliding window to {calls.windows} of {windows} attention layers"
    capped = bool(getattr(config, "attn_logit_softcapping", None))
    return "does not name its soft-cap to attention" if capped and calls.caps != layers else ""


def run(model: Any, tokens: Tensor, context: Context, places: list[int]) -> Tensor:
    """The last hidden states of one row, (T, H); `places` are its positions."""
    where = torch.tensor(places, device=tokens.device)
    out = model.base_model(input_ids=tokens[None], position_ids=where[None], attend=context)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def _in_blocks(model: Any, tokens: Tensor) -> Tensor:
    """A prefill and a last token, over blocks of 4 that do not lie in order."""
    store, blocks, n = BlockStore(8, 4), (5, 0, 7, 2), len(tokens) - 1
    spans = (Span(0, 0, n, 0, blocks), Span(0, 0, 1, n, blocks))
    made = [
        run(model, chunk, Paged(store, (span,)), list(range(span.past, span.past + len(chunk))))
        for chunk, span in zip((tokens[:n], tokens[n:]), spans, strict=True)
    ]
    return torch.cat(made)


def _tokens(n: int, salt: int, model: Any) -> Tensor:
    size = min(int(model.config.get_text_config().vocab_size), 1000)
    return torch.tensor([(7 * i * salt + salt) % size for i in range(1, n + 1)], device=model.device)


def _equal(a: Tensor, b: Tensor, close: float) -> bool:
    return bool(torch.linalg.vector_norm((a - b).float()) <= close * torch.linalg.vector_norm(b.float()))


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _switched(model: Any, name: str) -> Iterator[None]:
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _watched(model: Any) -> Iterator[Calls]:
    """Our attention under another name, for this model alone, which counts what reaches it."""
    calls, ours = Calls(), AttentionInterface()[model.config.get_text_config()._attn_implementation]

    def counting(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attend") is not None:
            calls.contexts += 1
            calls.windows += bool(kwargs.get("sliding_window"))
            calls.caps += bool(kwargs.get("softcap"))
        return ours(*args, **kwargs)

    AttentionInterface.register(WATCH, counting)
    AttentionMaskInterface.register(WATCH, sdpa_mask)
    with _switched(model, WATCH):
        yield calls
