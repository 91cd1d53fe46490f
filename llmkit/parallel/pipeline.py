"""Pipeline parallelism: a model's layers are dealt to ranks in their order, a stage each, and each rank keeps its own.

What comes before the layers and after them, transformers says (`base_model_pp_plan`), read as data. The model's own
forward runs on every rank: in the place of a module of another stage stands one that gives on what it is given, so that
layers keep their numbers, and parameters their names. A stage after the first is given hidden states in place of
tokens. Whether that is all that the family's forward does, `tried` finds out while every rank has the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from llmkit.core.errors import ModelError
from llmkit.core.types import Batch
from llmkit.parallel.fits import stages_of

FAULTS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a forward raises that is given other things than it is made for."""
PROBE = 16
"""Tokens that both ways are compared on."""


@dataclass(frozen=True)
class Unit:
    """A module that one stage has: `owner` has it under `key`."""

    owner: nn.Module
    key: str
    module: nn.Module
    stage: int


@dataclass(frozen=True)
class Border:
    """What one stage gives to the next for each token."""

    width: int
    dtype: torch.dtype


class Gone(nn.Module):
    """Stands in the place of a module that another stage has: gives on what it is given."""

    def __init__(self, was: nn.Module) -> None:
        super().__init__()
        for key, value in vars(was).items():  # such as the kind of a layer's attention, which the forward reads
            if isinstance(value, bool | int | float | str) and not key.startswith("_"):
                setattr(self, key, value)

    def forward(self, hidden_states: Tensor, *others: Any, **more: Any) -> Tensor:
        """(B, T, H), as it is."""
        return hidden_states


class Stages:
    """A model of transformers whose modules are dealt to `count` stages; whole until `settle`."""

    def __init__(self, base: nn.Module, count: int) -> None:
        self.base, self.count = cast(Any, base), count
        self.decoder: Any = self.base.base_model
        self.given: Tensor | None = None
        """Hidden states that the next forward begins with, in place of tokens."""
        self.units = self._dealt(self._planned())
        self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.given is None:
            return None
        return args, {**{k: v for k, v in kwargs.items() if k != "input_ids"}, "inputs_embeds": self.given}

    def _planned(self) -> tuple[list[str], str, list[str]]:
        """Children of the decoder: those before the layers, the layers, those after them.

        Raises:
            ModelError: transformers has no plan, or one that is not of this kind.
        """
        plan = list(getattr(self.decoder.config, "base_model_pp_plan", None) or ())
        if not plan:
            self.refuse("transformers has no plan for it")
        children = dict(self.decoder.named_children())
        lists = [name for name in plan if isinstance(children.get(name), nn.ModuleList)]
        if missing := [name for name in plan if name not in children]:
            self.refuse(f"transformers' plan names {missing[0]}, which {type(self.decoder).__name__} has not")
        if len(lists) != 1 or self.decoder is self.base:
            self.refuse("transformers' plan has not one list of layers between embeddings and a norm")
        at = plan.index(lists[0])
        if odd := self._unknown(plan):
            self.refuse(f"transformers' plan does not speak of {odd}")
        return plan[:at], lists[0], plan[at + 1 :]

    def _unknown(self, plan: Sequence[str]) -> str:
        """A parameter of the decoder that no entry of the plan has."""
        return next((n for n, _ in self.decoder.named_parameters() if n.partition(".")[0] not in plan), "")

    def _dealt(self, planned: tuple[list[str], str, list[str]]) -> tuple[Unit, ...]:
        before, held, after = planned
        layers = list(cast(nn.ModuleList, getattr(self.decoder, held)))
        outside = [(self.base, key) for key, child in self.base.named_children() if child is not self.decoder]
        ends = [(self.decoder, key) for key in after] + outside
        counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        tail = sum(p.numel() for owner, key in ends for p in getattr(owner, key).parameters())
        homes = stages_of(counts, tail, self.count)
        units = [Unit(self.decoder, key, getattr(self.decoder, key), 0) for key in before]
        owner = getattr(self.decoder, held)
        units += [Unit(owner, str(i), layer, home) for i, (layer, home) in enumerate(zip(layers, homes, strict=True))]
        return (*units, *(Unit(owner, key, getattr(owner, key), self.count - 1) for owner, key in ends))

    def layers(self, stage: int) -> list[int]:
        """The numbers of a stage's layers."""
        return [int(unit.key) for unit in self.units if unit.key.isdecimal() and unit.stage == stage]

    def show(self, stage: int | None) -> None:
        """The model is what a stage has of it; the whole again with None."""
        for unit in self.units:
            here = stage is None or unit.stage == stage
            setattr(unit.owner, unit.key, unit.module if here else Gone(unit.module))

    @contextmanager
    def begun(self, hidden: Tensor | None) -> Iterator[None]:
        """Inside, a forward begins with these hidden states, (B, T, H); with tokens where there are none."""
        self.given = hidden
        try:
            yield
        finally:
            self.given = None

    def settle(self, stage: int) -> None:
        """For good, the model is what a stage has: the memory of the others' weights is free."""
        self.show(stage)
        alive = {id(p) for p in self.base.parameters()}
        for unit in self.units:
            for p in unit.module.parameters():
                if id(p) not in alive:
                    p.data = p.data.new_empty(0)
                    p.grad = None

    def refuse(self, why: str, fix: str = "set parallel.pipeline=1, or use parallel.strategy=fsdp") -> NoReturn:
        """Raises: ModelError, with the family."""
        what = f"{type(self.base).__name__} cannot run in {self.count} stages: {why}"
        raise ModelError(what, fix=fix, key="parallel.pipeline")


def tried(stages: Stages, scored: Any, autocast: Any) -> list[Border]:
    """What each stage but the last gives to the next, after a try of all of them in turn on a few tokens: they must
    come to what the whole model gives. Called while it is whole; it is so after it.

    Raises:
        ModelError: they do not: the family's forward does more than to go through its layers.
    """
    batch, training, borders = _few(stages.base), scored.training, list[Border]()
    scored.eval()
    hidden: Tensor | None = None
    try:
        with torch.no_grad(), autocast():
            whole = scored.hidden(batch)
            for stage in range(stages.count):
                stages.show(stage)
                with stages.begun(hidden):
                    hidden = scored.hidden(batch)
                borders.append(Border(hidden.shape[-1], hidden.dtype))
    except torch.OutOfMemoryError:
        raise
    except FAULTS as cause:
        stages.refuse(f"its forward does more than to go through its layers ({cause!r:.120})")
    finally:
        stages.show(None)
        scored.train(training)
    close = 1e-5 if whole.dtype == torch.float32 and borders[0].dtype == torch.float32 else 2e-2
    if hidden is None or hidden.shape != whole.shape:
        stages.refuse("its forward does more than to go through its layers")
    gap = float((hidden - whole).float().norm() / whole.float().norm())
    if not gap <= close:
        stages.refuse(f"its forward does more than to go through its layers (off by {gap:.2g} in stages)")
    return borders[:-1]


def _few(base: Any) -> Batch:
    """One row of a few tokens."""
    device = next(base.parameters()).device
    tokens = torch.arange(1, PROBE + 1, device=device)[None] % int(base.config.get_text_config().vocab_size)
    positions = torch.arange(PROBE, device=device)[None]
    return Batch(tokens, positions, tokens, torch.zeros(tokens.shape, device=device), None, (0,), (PROBE,))
