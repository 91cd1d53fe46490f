"""Asking once of modules that are alike: what is found out by trying one need not be tried on the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

OWN = frozenset(vars(nn.Module()))
"""What every module has; of these parameters, buffers, submodules and hooks count."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
Asked = Callable[[Any], bool]


class Once:
    """Asks a question of one module of each make."""

    def __init__(self) -> None:
        self.known: dict[Hashable, bool] = {}

    def __call__(self, asked: Asked, module: nn.Module) -> bool:
        """What `asked` says of a module, or said of one that is made like it."""
        key = asked, make(module)
        if key not in self.known:
            self.known[key] = asked(module)
        return self.known[key]


def make(module: nn.Module) -> Hashable:
    """All that a module's forward follows from but the numbers in its tensors. A module with hooks is a make of
    its own, and so is one with a forward of its own, which no other has."""
    if any(vars(module)[name] for name in HOOKS):
        return object()  # equal to nothing, and no address that another module may have later
    tensors = {**module._parameters, **module._buffers}
    own = {name: value for name, value in vars(module).items() if name not in OWN}
    return (
        type(module),
        tuple((name, _plain(value)) for name, value in own.items()),
        tuple((name, _outline(value)) for name, value in tensors.items()),
        tuple((name, None if child is None else make(child)) for name, child in module._modules.items()),
    )


def _plain(value: Any) -> Hashable:
    """Numbers and names by what they say, all else by being the same thing."""
    return (type(value), value) if isinstance(value, bool | int | float | str) else id(value)


def _outline(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
