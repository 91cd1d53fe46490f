"""A model over several devices of one process, and the host's memory, and a disk: layers lie where there is room, and
what is not on the device that computes is brought there for its turn (accelerate's dispatch)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.memory import is_out_of_memory
from llmkit.inference.node import Placement
from llmkit.models.decoder import Decoder
from llmkit.models.node import NoQuant, Quant


def check_placement(placement: Placement, quant: Quant = NoQuant()) -> None:
    """Raises: RecipeError when a device is not there; ModelError where the model is quantised."""
    if not isinstance(quant, NoQuant):
        what = "a quantised base is not placed over devices"
        raise ModelError(what, fix="leave placement out, or drop quant", key="placement")
    if not isinstance(placement, str):
        _room(placement)


def place(decoder: Decoder, placement: Placement) -> dict[str, str]:
    """Spreads the engine's twin of a model, which is whole on the host before; gives where its modules are. The model
    that it is a twin of is not to be run any more.

    Raises:
        RecipeError: a device is not there.
        ModelError: there is no room for the model.
    """
    from accelerate import dispatch_model, infer_auto_device_map

    model: Any = decoder.causal
    room = None if isinstance(placement, str) else _room(placement)
    split = list(getattr(model, "_no_split_modules", None) or ())
    try:
        found = infer_auto_device_map(model, max_memory=room, no_split_module_classes=split)
        if set(found) == {""}:  # dispatch looks for names below it, and would find no weight for a disk
            found = dict.fromkeys((name for name, _ in model.named_children()), found[""])
        if room is not None and (odd := {str(where) for where in found.values()} - set(map(str, room))):
            raise ModelError(
                f"the model has no room in {', '.join(map(str, placement))}: some of it would go to {min(odd)}",
                fix=f"give more, or name {min(odd)} too",
                key="placement",
            )
        if len(set(found.values())) > 1 or "disk" in found.values():
            aside = tempfile.TemporaryDirectory(prefix="llmkit-")
            main = next((where for where in found.values() if isinstance(where, int)), "cpu")
            dispatch_model(model, found, main_device=main, offload_dir=aside.name)
            model.offloaded = aside  # goes with the model
        elif (where := next(iter(found.values()))) != "cpu":
            model.to(where)
    except (ValueError, RuntimeError) as cause:
        if is_out_of_memory(cause):
            raise
        why = (str(cause).strip().splitlines() or [""])[0][:160]
        raise ModelError(
            f"the model cannot be placed: {why}", fix="name other devices or sizes", key="placement"
        ) from cause
    return {name: str(where) for name, where in found.items()}


def _room(placement: Mapping[str, int]) -> dict[int | str, int]:
    """As accelerate calls devices."""
    made: dict[int | str, int] = {}
    for device, size in placement.items():
        kind, _, number = device.partition(":")
        there = device in ("cpu", "disk") or (kind == "cuda" and number.isdecimal() and int(number) < _cards())
        if not there:
            known = ", ".join(["cpu", "disk", *(f"cuda:{n}" for n in range(_cards()))])
            raise RecipeError(f"{device} is no device here", fix=f"name some of {known}", key="placement")
        made[int(number) if kind == "cuda" else device] = size
    return made


def _cards() -> int:
    return torch.cuda.device_count()
