"""Rotations whose frequencies follow the length of the sequence (`dynamic`, `longrope`), sequence by sequence.

transformers takes the largest position of the whole forward, so that a sequence turns by the longest one beside it, and
`dynamic` by the longest before it too. Ours give each sequence what transformers gives it alone in a new model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmkit.core.recast import recast
from llmkit.core.types import Split
from llmkit.models.lengths import sequence_lengths, split_lengths

MOVING = ("dynamic", "longrope")
"""The kinds of RoPE whose frequencies depend on a length."""


def turn_by_sequence(model: nn.Module) -> None:
    """Puts ours in the place of the rotary modules of `model` whose frequencies move."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, Turning) and _moves(child):
                made = recast(child, Turning)
                made.raw = inspect.unwrap(type(child).forward)
                setattr(parent, name, made)


def tell_lengths(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a forward of a model that has rotations of ours: what a rank holds of a row does not show how long its
    sequences are."""
    split = kwargs.get("attend")
    told = split_lengths(split, kwargs["position_ids"].device) if isinstance(split, Split) else None
    for rotary in (part for part in module.modules() if isinstance(part, Turning)):
        rotary.told = told


def moving(model: Any) -> str:
    """The kind of RoPE in a model's configuration whose frequencies move, or nothing."""
    said = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if said.get("alpha") and not any(_kinds(module) & set(MOVING) for module in model.modules()):
        return ""  # HunYuan: it says `dynamic`, and means a base that stays
    sets = [said, *(held for held in said.values() if isinstance(held, dict))]
    return next((held["rope_type"] for held in sets if held.get("rope_type") in MOVING), "")


def turns_by_sequence(model: nn.Module) -> bool:
    """Whether the model has rotary modules of ours."""
    return any(isinstance(module, Turning) for module in model.modules())


def _moves(module: nn.Module) -> bool:
    return not _kinds(module).isdisjoint(MOVING) and hasattr(module, "config")


def _kinds(module: nn.Module) -> set[str]:
    """The kinds of RoPE that a module turns by: none, one, or one for each type of layer."""
    said = getattr(module, "rope_type", None)
    return set(said.values() if isinstance(said, dict) else [said] if said else [])


class Turning(nn.Module):
    """A rotary module of transformers under a forward that asks each sequence for its own length.

    A sequence is a run of positions that each follow the one before: packed and padded rows are cut where that ends.
    """

    told: Tensor | None = None
    """Of a row that several ranks hold: the length of each token's whole sequence, (1, T / N)."""
    raw: Callable[..., tuple[Tensor, Tensor]]
    """The forward of the family, without what changes its frequencies."""
    config: Any
    rope_type: Any

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, D) of positions (B, T)."""
        lengths = sequence_lengths(position_ids) if self.told is None else self.told
        if self.kind(layer_type) == "longrope":  # one table above the trained length, whatever the length
            lengths = lengths.clamp(max=self.trained(layer_type) + 1)
        found = lengths.clamp(min=self.trained(layer_type)).unique().tolist()
        if len(found) == 1:
            return self.turned(x, position_ids, layer_type, found[0])
        made: list[Tensor] = []
        for length in found:
            here = lengths == length if length > self.trained(layer_type) else lengths <= length
            parts = self.turned(x, position_ids[here][None], layer_type, length)
            made = made or [part.new_empty(*position_ids.shape, part.shape[-1]) for part in parts]
            for whole, part in zip(made, parts, strict=True):
                whole[here] = part[0]
        return made[0], made[1]

    def kind(self, layer_type: str | None) -> str:
        """Of the layers of this type."""
        return str(self.rope_type if layer_type is None else self.rope_type[layer_type])

    def trained(self, layer_type: str | None) -> int:
        """The length up to which frequencies stay as they are; of those that never move, as good as endless."""
        kind, said = self.kind(layer_type), self.config.rope_parameters
        if kind == "longrope":
            return int((said if layer_type is None else said[layer_type])["original_max_position_embeddings"])
        return int(self.config.max_position_embeddings) if kind == "dynamic" else 1 << 62

    def turned(self, x: Tensor, positions: Tensor, layer_type: str | None, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions of sequences of this length."""
        named = {} if layer_type is None else {"layer_type": layer_type}
        prefix = "" if layer_type is None else f"{layer_type}_"
        table = getattr(self, f"{prefix}original_inv_freq")
        if length > self.trained(layer_type):
            count = torch.tensor(length, device=x.device)  # as transformers counts: its sums are those of a tensor
            table, _ = ROPE_INIT_FUNCTIONS[self.kind(layer_type)](self.config, x.device, seq_len=count, **named)
        setattr(self, f"{prefix}inv_freq", table.to(x.device))
        return self.raw(self, x, positions, **named)

    def steady(self, start: int, end: int) -> bool:
        """Whether a sequence turns alike at every length from `start` to `end`: then its keys may be kept."""
        kinds = [None] if not isinstance(self.rope_type, dict) else list(self.rope_type)
        for layer_type in kinds:
            kind, trained = self.kind(layer_type), self.trained(layer_type)
            if not (end <= trained or start == end or (kind == "longrope" and start > trained)):
                return False
        return True
