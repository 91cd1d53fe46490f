"""A layer of a serving twin in one call, where it is the usual one: norm, attention, norm, gated MLP.

Of a step of few rows what Python does between some seven calls takes as long as what these compute. Whether a layer is
the usual one is found out by trying it, to the bit, so that nothing here knows a family by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from llmkit_kernels import paged
from llmkit_kernels.layer import Layer, Norm, Rule, lacks
from llmkit_kernels.linear import place
from llmkit_kernels.plain import flat
from torch import Tensor

from llmkit.core.types import Paged, Span
from llmkit.models.attend import NO_MASK
from llmkit.models.paged import BlockStore
from llmkit.models.served import ServedMlp, ServedNorm
from llmkit.models.served_attention import ServedAttention
from llmkit.models.served_linears import Asked, Part, free, ready

MOST = 256
"""Rows up to which it is worth a call: with more of them what Python does does not count, and its room would."""
TOKENS = 5
"""Of the trial."""
PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class ServedLayer:
    """The forward of such a layer; what does not go this way (other contexts, adapters by row, something that hangs on
    a part of it) goes the family's."""

    def __init__(self, module: Any) -> None:
        self.module, self.forward, self.held = module, module.forward, module._modules
        self.attention: ServedAttention = self.held["self_attn"].forward
        self.asked = Asked(self._ready)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(1, T, hidden) -> the same."""
        made = None if args else self._made(hidden_states, **kwargs)
        return self.forward(hidden_states, *args, **kwargs) if made is None else made

    def _made(
        self, hidden_states: Tensor, attend: Any = None, position_embeddings: Any = None, **others: Any
    ) -> Tensor | None:
        if type(attend) is not Paged or position_embeddings is None or not _few(hidden_states):
            return None
        rows, (cos, sin) = hidden_states[0], position_embeddings
        if cos.shape != (1, len(rows), self.attention.size) or not (flat(cos) and flat(sin)):
            return None
        held, laid = attend.store.there(self.attention.module.layer_idx), attend.laid
        if held is None or not paged.turns(held) or held.block > paged.LARGEST:
            return None
        if not laid.full or len(laid.slots) != len(rows):
            return None
        layer = self._known(rows)
        return None if layer is None else layer.run(rows, held, laid, (cos[0], sin[0]))[None]

    def _known(self, rows: Tensor) -> Layer | None:
        """What it does to rows (T, hidden), if it is the usual."""
        attention, mlp, norms = self.held["self_attn"], self.held["mlp"], self._norms()
        whole = type(mlp) is ServedMlp and "forward" not in mlp.__dict__ and not self.module.training
        if not whole or attention.__dict__.get("forward") is not self.attention:
            return None
        beside, linears = _state(norms), self._linears()
        there = [norm for norm in norms if norm is not None]
        if beside is None or not free([*linears, attention, mlp, *there]):
            return None
        return self.asked.ready(rows, linears, beside)

    def _linears(self) -> list[Any]:
        inner, mlp = self.attention.held, self.held["mlp"]._modules
        names = ((inner, "q_proj"), (inner, "k_proj"), (inner, "v_proj"), (inner, "o_proj"))
        return [of[name] for of, name in (*names, (mlp, "gate_proj"), (mlp, "up_proj"), (mlp, "down_proj"))]

    def _norms(self) -> list[Any]:
        inner = self.attention.held
        own = self.held["input_layernorm"], self.held["post_attention_layernorm"]
        return [*own, inner.get("q_norm"), inner.get("k_norm")]

    def _ready(self, told: list[Part]) -> Layer:
        rule, size = self.attention.rule, self.attention.size
        heads, held = (one.weight.shape[0] // size for one in told[:2])
        norms = [None if one is None else Norm(one.weight, one.variance_epsilon) for one in self._norms()]
        parts = ready(told[:3]), ready(told[3:4]), ready(told[4:6]), ready(told[6:])
        return Layer(*parts, norms, Rule(heads, held, size, rule.window, rule.scale, rule.cap))


def _few(x: Tensor) -> bool:
    """Whether these are rows of a step that asks for no gradient, as they are read."""
    return x.dim() == 3 and x.shape[0] == 1 and 0 < x.shape[1] <= MOST and flat(x) and not torch.is_grad_enabled()


def _state(norms: Sequence[Any]) -> list[Any] | None:
    """All that follows what these do, to be compared; nothing, where one of them is another kind."""
    made = list[Any]()
    for one in norms:
        if one is None:
            made.append(None)
            continue
        if type(one) is not ServedNorm or "forward" in one.__dict__:
            return None
        at = place(cast(Tensor, one._parameters["weight"]))
        if at is None:
            return None
        made += at, one.variance_epsilon
    return made


def join(model: Any) -> int:
    """Gives layers of a twin that forward, where it does what their own does, to the bit; tells how many."""
    found = [] if lacks() else [module for module in model.modules() if _suits(module) and _alike(module)]
    for module in found:
        module.forward = ServedLayer(module)
    return len(found)


def _suits(module: Any) -> bool:
    """Whether a module has the parts, and nothing beside."""
    held = module._modules
    if set(held) != PARTS or module._parameters or module._buffers:
        return False
    return type(held["self_attn"].__dict__.get("forward")) is ServedAttention


@torch.no_grad()
def _alike(module: Any) -> bool:
    """Whether the joined way gives the same as the layer's own, to the bit."""
    made, drawn = ServedLayer(module), torch.Generator().manual_seed(0)
    sizes = (cast(Tensor, module.self_attn.q_proj.weight).shape[1], *[made.attention.size] * 2)
    x, cos, sin = (torch.randn(1, TOKENS, n, generator=drawn) for n in sizes)
    attend = Paged(BlockStore(1, TOKENS), (Span(0, 0, TOKENS, 0, (0,)),))
    given = {"position_embeddings": (cos, sin), "attention_mask": NO_MASK, "past_key_values": None, "attend": attend}
    try:
        own = module.forward(x, **given)
        ours = made._made(x, attend=attend, position_embeddings=(cos, sin))
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it wants more than a layer like this is given
        return False
    return ours is not None and isinstance(own, Tensor) and torch.equal(own, ours)
