"""Weights that are still in their files: each is read when its module is asked for, so that no more of a model than a
layer lies whole on a device that is to hold a part of it.

Until then a parameter has its shape, type and device, and the memory of one number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


WHOLE = "each rank reads the whole model before it is cut"


@dataclass(frozen=True)
class Entry:
    """A parameter that is not here, and how it comes."""

    param: nn.Parameter
    read: Callable[[], Tensor]
    """Its value, on any device and of any type; a part of a mapped file where that will do."""
    put: Callable[[Tensor], None] | None = None
    """Makes of the value what the parameter holds, where that is not the value itself: a quantised one."""
    drop: Callable[[], None] | None = None
    """Takes back what `put` made."""

    def fill(self) -> None:
        """The parameter has its value."""
        if self.put is not None:
            self.put(self.read())
            return
        self.param.data = self.read().to(self.param.device, self.param.dtype)

    def empty(self) -> None:
        """It has the memory of one number again."""
        if self.drop is not None:
            self.drop()
            return
        self.param.data = stand_in(tuple(self.param.shape), self.param.dtype, self.param.device)


class Deferred:
    """The parameters of a model that are not here yet."""

    def __init__(self, entries: Iterable[Entry] = (), layers: Iterable[nn.Module] = (), say: str = WHOLE) -> None:
        self.entries = {id(entry.param): entry for entry in entries}
        self.layers = tuple(layers)
        """Where all of them are."""
        self.say = say
        """How the model is read, for the user."""

    def __len__(self) -> int:
        return len(self.entries)

    def fill(self, module: nn.Module) -> None:
        """Reads what a module has, with all modules in it; its parameters are as any others from now on."""
        for entry in self._of(module):
            entry.fill()
            del self.entries[id(entry.param)]

    def change(self, param: Any, of: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> bool:
        """A parameter becomes the part `of` it, of that shape: of the file, that part alone is read. False if it is
        here: nothing is done then."""
        entry = self.entries.get(id(param))
        if entry is None:
            return False
        if entry.put is not None:
            raise ValueError("a quantised weight has no parts")
        param.data = stand_in(shape, param.dtype, param.device)
        self.entries[id(param)] = replace(entry, read=lambda: of(entry.read()))
        return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model and its modules can be run: each is read as it is called, and given up after it."""
        handles: list[Any] = []
        filled: list[list[Entry]] = []

        def enter(module: nn.Module, *_: Any) -> None:
            now = [entry for entry in self._of(module) if id(entry.param) not in here]
            filled.append(now)
            for entry in now:
                entry.fill()
                here.add(id(entry.param))

        def leave(*_: Any) -> None:
            for entry in filled.pop():
                entry.empty()
                here.discard(id(entry.param))

        here: set[int] = set()
        for module in [module for layer in self.layers for module in layer.modules()]:
            if self._of(module):
                handles.append(module.register_forward_pre_hook(enter, prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            while filled:
                leave()

    def _of(self, module: nn.Module) -> list[Entry]:
        found = (self.entries.get(id(p)) for p in module.parameters())
        return [entry for entry in found if entry is not None]


def stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros of that shape in the memory of one."""
    from torch import zeros

    return zeros(1, dtype=dtype, device=device).expand(shape)
