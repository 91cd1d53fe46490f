"""Hidden states of a model, as its newest forward made them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from llmkit.core.errors import ModelError
from llmkit.models.layers import layers


class Kept(threading.local):
    """What came out, in the thread that ran the model: an adapter is tried in another between two of its forwards."""

    def __init__(self, count: int) -> None:
        self.states: list[Any] = [None] * count


class Taps:
    """Reads what comes out of modules by hooks, as long as there is this object: nothing is copied, and what the model
    computes stays as it is."""

    def __init__(self, causal: Any, which: Sequence[int]) -> None:
        """`causal`: of transformers. `which`: hidden states as it numbers them: i is the output of the i-th layer,
        counted from 1, and the number of layers is what the head reads, after the norm.

        Raises:
            ModelError: the model has no such layer.
        """
        own = layers(causal)
        if wrong := [at for at in which if not 1 <= at <= len(own)]:
            what = f"the output of layer {wrong[0]} is read, and the model has {len(own)}"
            raise ModelError(what, fix="give a head that was made for it", key="speculation.path")
        self.kept = Kept(len(which))
        hooks = [
            (causal.base_model if at == len(own) else own[at - 1]).register_forward_hook(_hook(self.kept, place))
            for place, at in enumerate(which)
        ]
        self.close = weakref.finalize(self, _close, hooks)
        """Nothing is read any longer."""

    def take(self) -> list[Tensor]:
        """Of the newest forward of this thread (N, H) each; they are let go of here.

        Raises:
            ModelError: a layer was not run, or gives no hidden states of one row.
        """
        taken, self.kept.states = self.kept.states, [None] * len(self.kept.states)
        wrong = [state for state in taken if state is None or state.dim() != 3 or state.shape[0] != 1]
        if wrong:
            shape = "nothing" if wrong[0] is None else tuple(wrong[0].shape)
            what = f"a layer of it gives {shape}, not the hidden states of one row"
            raise ModelError(what, fix="use speculation: {kind: ngram}", key="speculation.kind")
        return [state[0] for state in taken]


def _hook(kept: Kept, place: int) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_: nn.Module, __: Any, out: Any) -> None:
        last = getattr(out, "last_hidden_state", None)
        kept.states[place] = last if last is not None else out[0] if isinstance(out, tuple) else out

    return keep


def _close(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()
