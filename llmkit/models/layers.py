"""The layers of a model."""

from __future__ import annotations

from torch import nn


def layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of a model, from the first to the last: the longest list of modules of one class that lies in no other
    such list, as experts do."""
    lists = {
        name: tuple(m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
    }
    outer = [held for name, held in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outer, key=len, default=())
