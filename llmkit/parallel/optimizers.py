"""The optimizers of a run as one: over disjoint parameters, with a state that is tensors alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PLAIN = {"bool": bool, "int": int, "float": float}
"""What a state may hold beside tensors, by the mark at the end of its name in a checkpoint."""


class Optimizers:
    """Several optimizers driven as one; `carried` names what they keep in their groups between steps."""

    def __init__(self, parts: Sequence[Optimizer], carried: Sequence[str] = ()) -> None:
        self.parts, self.carried = tuple(parts), tuple(carried)
        self.groups = [(part, group) for part in self.parts for group in part.param_groups]
        self.home = {id(p): held for held in self.groups for p in held[1]["params"]}
        self.rates = [group["lr"] for _, group in self.groups]
        self._mode("train")

    def rate(self, factor: float) -> None:
        """Sets every rate to `factor` times its own."""
        for (_, group), rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def step(self) -> None:
        """Applies all gradients."""
        for part in self.parts:
            part.step()

    def step_alone(self, p: nn.Parameter) -> None:
        """Applies the gradient of a parameter that has an optimizer for itself."""
        self.home[id(p)][0].step()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are those to evaluate; after it they are to the bit what they were."""
        if not any(hasattr(part, "eval") for part in self.parts):
            yield
            return
        params = [p for _, group in self.groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        self._mode("eval")
        try:
            yield
        finally:
            self._mode("train")
            with torch.no_grad():
                for p, held in zip(params, before, strict=True):
                    p.copy_(held)

    def settle(self) -> None:
        """The weights are those to evaluate from now on: nothing is trained any more, and their shapes may change."""
        self._mode("eval")

    def _mode(self, name: str) -> None:
        for part in self.parts:
            if hasattr(part, name):
                getattr(part, name)()

    def state(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """`NAME/KEY` for tensors and `NAME/KEY:TYPE` for plain numbers, not copied; a group's under each name."""
        made: dict[str, Tensor] = {}
        for name, p in params.items():
            part, group = self.home[id(p)]
            made |= named(name, part.state.get(p, {}))
            made |= named(f"{name}/group", {key: group[key] for key in self.carried})
        return made

    def load(self, params: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        held: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, rest = key.partition("/")
            held.setdefault(name, {})[rest] = value
        for name, p in params.items():
            part, group = self.home[id(p)]
            mine = held.get(name, {})
            group.update({k[6:].partition(":")[0]: plain(k, v) for k, v in mine.items() if k.startswith("group/")})
            state = {k.partition(":")[0]: put(part, k, v, p) for k, v in mine.items() if not k.startswith("group/")}
            part.state.pop(p, None)
            if state:
                part.state[p] = state


def named(name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """`NAME/KEY` for tensors and `NAME/KEY:TYPE` for plain numbers; not copied."""
    made = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            made[f"{name}/{key}"] = value.detach()
        elif type(value) in PLAIN.values():
            kind = torch.float64 if type(value) is float else None
            made[f"{name}/{key}:{type(value).__name__}"] = torch.tensor(value, dtype=kind)
        elif value is not None:
            raise TypeError(f"{key} of an optimizer is {type(value).__name__}, which no checkpoint holds")
    return made


def plain(key: str, value: Tensor) -> Any:
    """The plain number that was named `KEY:TYPE`."""
    return PLAIN[key.partition(":")[2]](value.item())


def put(part: Optimizer, key: str, value: Tensor, p: Tensor) -> Any:
    """A state entry as the optimizer keeps it: a count of steps lies beside the parameter where the device reads it."""
    if ":" in key:
        return plain(key, value)
    if key == "step" and not (part.defaults.get("fused") or part.defaults.get("capturable")):
        return value.to("cpu", copy=True)
    return value.to(p.device, copy=True)
