"""Other weights for a model that is loaded, of a folder: all that differ are checked before any is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmkit.core.errors import ModelError
from llmkit.models.safe import check_folder


def renewal(model: Any, folder: Path) -> Callable[[], None]:
    """What puts a folder's weights in the place of a model's own; nothing is changed before it is called.

    Raises:
        ModelError: the folder is not sound, or its weights are not those of this model by name and shape.
    """
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    found: dict[str, torch.Tensor] = {}
    for file, header in check_folder(folder).items():
        with safe_open(folder / file, framework="pt") as held:
            found |= {name: held.get_tensor(name) for name in header}
    tied = {name for name in own.keys() - found.keys() if any(own[name] is own[other] for other in found.keys() & own)}
    fix = "give weights of the same model"
    if other := sorted((own.keys() - tied) ^ found.keys()):
        raise ModelError(f"{other[0]} is in one of the two alone", fix=fix, key="path")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            what = f"{name} has the shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            raise ModelError(what, fix=fix, key="path")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds NaN or infinity", fix=fix, key="path")

    def work() -> None:
        with torch.no_grad():
            for name, tensor in found.items():
                own[name].copy_(tensor)

    return work
