"""Which linears a method is for, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmkit.core.shape import Shape, is_embedding

BARE = re.compile(r"\.experts\.\d+\.|\.(gate|router)$")
"""In the files of mixture models: linears that transformers holds as bare parameters, which no adapter reaches."""


def linears(shape: Shape, wanted: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of the linears in a model's files that `wanted` names."""
    found = {name.removesuffix(".weight"): size for name, size in shape.tensors.items() if not is_embedding(name)}
    return {
        name: (size[1], size[0])
        for name, size in found.items()
        if len(size) == 2 and named(name, wanted) and not BARE.search(name)
    }


def named(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether it is meant, by peft's rules: all, a regular expression for the whole name, or whole parts at its end."""
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, name) is not None
    return ends(name, wanted)


def ends(name: str, wanted: Sequence[str]) -> bool:
    """Whether a name ends with one of these, in whole parts."""
    return any(f".{name}".endswith(f".{end}") for end in wanted)
