"""An attention layer of a serving twin in three calls: its projections, all that is done with them, and the way out.

A family's own forward asks torch some twenty times a layer, each for a few numbers: of a step of sixteen sequences of a
small model that is a third. What it computes is found out by trying it, so that nothing here knows a family by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from llmkit_kernels import linear, paged
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from llmkit.core.types import Packed, Paged, Segment
from llmkit.models.attend import NO_MASK, ruled
from llmkit.models.pieces import Rule
from llmkit.models.served_linears import Asked, ServedLinear, ServedLora, free, ready

TRIED = "llmkit_tried"
"""The name, in transformers' interface, of the function that writes down what it is given."""
TOKENS = 5
"""Of the trial."""


@dataclass(frozen=True)
class Trial(Packed):
    """A context that keeps what attention was asked, and has it answer `out`."""

    out: Tensor = field(kw_only=True)
    asked: list[tuple[Tensor, Tensor, Tensor, Rule]] = field(kw_only=True)


def _tried(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    attend: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    known = {name: others[name] for name in inspect.signature(ruled).parameters if name in others}
    attend.asked.append((query, key, value, ruled(query, **known)))
    return attend.out, None


class ServedAttention:
    """The forward of an attention layer whose queries and keys are turned by halves; what does not go this way (other
    contexts, linears with adapters on them) goes the family's."""

    def __init__(self, module: Any, rule: Rule, size: int) -> None:
        """`size` of a head."""
        self.module, self.forward, self.rule, self.size = module, module.forward, rule, size
        self.held, self.asked = module._modules, Asked(ready)
        """Looked at in each call: a linear may be replaced."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states (1, T, hidden) -> the same, and no weights."""
        made = None if args else self._made(**kwargs)
        return self.forward(*args, **kwargs) if made is None else (made, None)

    def _made(
        self, hidden_states: Tensor, attend: Any = None, position_embeddings: Any = None, **others: Any
    ) -> Tensor | None:
        rows = hidden_states[0]
        if not isinstance(attend, Paged) or hidden_states.shape[0] != 1:
            return None
        if position_embeddings is None or position_embeddings[0].shape != (1, rows.shape[0], self.size):
            return None  # this layer turns nothing, or a part of each head alone
        inner = self.inner()
        fits = free(inner) and paged.suits(rows, rows, rows, attend.laid.block)
        known = self.asked.ready(rows, inner) if fits else None
        if known is None:
            return None
        q, k, v = self.projected(rows, known)
        held = attend.store.held(self.module.layer_idx, k, v)
        cos, sin = (x[0] for x in position_embeddings)
        rule = self.rule
        if not paged.turns(held):
            q, k, turn = turned(q, cos, sin), turned(k, cos, sin), None
        else:
            turn = cos, sin
        out = paged.attend(q, k, v, held, attend.laid, rule.scale, rule.window, rule.cap, None, turn)
        return cast(Tensor, self.module.o_proj(out.view(1, rows.shape[0], -1)))

    def inner(self) -> list[Any]:
        """Its linears before attention."""
        return [self.held["q_proj"], self.held["k_proj"], self.held["v_proj"]]

    def projected(self, rows: Tensor, inner: linear.Ready) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (H, T, D), keys and values (KV, T, D), before they are turned, by what its linears do."""
        made = inner.many(rows)
        (count, width), at, split = made.shape, 0, []
        for out, norm in zip(inner.outs, ("q_norm", "k_norm", ""), strict=True):
            heads = out // self.size
            part = made.as_strided((count, heads, self.size), (width, self.size, 1), at)
            at += heads * self.size
            if norm in self.held:
                part = self.held[norm](part)
            split.append(part.transpose(0, 1))
        return split[0], split[1], split[2]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(H, T, D) turned by cosines and sines (T, D), halves against each other (RoPE, arXiv 2104.09864)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def shorten(model: Any) -> int:
    """Gives attention layers of a twin that forward, where it does what their own does, to the bit; tells how many."""
    found = [(module, made) for module in model.modules() if _suits(module) and (made := _alike(module)) is not None]
    for module, made in found:
        module.forward = made
    return len(found)


def _suits(module: Any) -> bool:
    """Whether a module has the parts."""
    inner: list[Any] = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    takes = inspect.signature(module.forward).parameters
    named = {"hidden_states", "position_embeddings", "attention_mask"} <= set(takes) and hasattr(module, "layer_idx")
    own = all(_known(one) and not one.weight.is_meta for one in inner)
    size = getattr(module, "head_dim", None)
    fits = own and isinstance(size, int) and not any(one.weight.shape[0] % size for one in inner[:3] if one)
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    return fits and named and all(one is None or list(one.weight.shape) == [size] for one in norms)


def _known(one: Any) -> bool:
    return isinstance(one, ServedLinear) or type(getattr(one, "forward", None)) is ServedLora


@torch.no_grad()
def _alike(module: Any) -> ServedAttention | None:
    """What the shorter way takes, if it gives attention the same as the module's own way, and makes the same of what
    comes back."""
    size, hidden = module.head_dim, module.q_proj.weight.shape[1]
    drawn = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(1, TOKENS, n, generator=drawn) for n in (hidden, size, size))
    out = torch.randn(1, TOKENS, module.o_proj.weight.shape[1], generator=drawn)
    asked = _asked(module, x, cos, sin, out)
    if asked is None:
        return None
    (q, k, v, rule), given = asked
    if rule.sinks is not None or q.shape[-1] != size:
        return None
    made = ServedAttention(module, rule, size)
    inner = made.asked.ready(x[0], made.inner())
    if inner is None:
        return None
    queries, keys, values = made.projected(x[0], inner)
    ours = turned(queries, cos[0], sin[0]), turned(keys, cos[0], sin[0]), values, module.o_proj(out)
    return made if all(torch.equal(a, b) for a, b in zip(ours, (q[0], k[0], v[0], given), strict=True)) else None


def _asked(module: Any, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Any:
    """What a layer asks attention, and what it gives in the end; nothing, where it cannot be tried alone."""
    AttentionInterface.register(TRIED, _tried)
    heads = out.view(1, TOKENS, -1, module.head_dim)
    trial = Trial((Segment(0, 0, TOKENS),), out=heads, asked=[])
    was, module.config._attn_implementation_internal = module.config._attn_implementation, TRIED
    try:
        given = module.forward(
            hidden_states=x, position_embeddings=(cos, sin), attention_mask=NO_MASK, past_key_values=None, attend=trial
        )
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it wants more than a layer like this is given
        return None
    finally:
        module.config._attn_implementation_internal = was
    return (trial.asked[0], given[0]) if len(trial.asked) == 1 else None
