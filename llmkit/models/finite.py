"""Whether the weights of a model's files are numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmkit.core.errors import ModelError
from llmkit.models.safe import Header


def check_finite(folder: Path, headers: dict[str, Header]) -> None:
    """Raises:
    ModelError: naming the tensor that holds NaN or infinity, and its file.
    """
    from safetensors import safe_open

    for file, header in headers.items():
        with safe_open(folder / file, "pt") as held:
            for name in header:
                if not finite(held.get_tensor(name)):
                    raise ModelError(
                        f"{name} holds NaN or infinity",
                        fix="use sound weights, or pass --allow-nonfinite to look at them",
                        file=str(folder / file),
                    )


def finite(value: Tensor) -> bool:
    """Whether all elements are; whole numbers, and floats of 8 bits, which torch cannot sum, count as such.

    What is no number makes the sum none, in one pass and without a copy; a sum may overflow by itself, and then each
    element is looked at.
    """
    if not value.is_floating_point() or value.element_size() == 1:
        return True
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())
