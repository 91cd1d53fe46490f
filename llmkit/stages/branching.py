"""Whether prompts are computed once for all that follows them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llmkit.core.types import Steady

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.models.load import Loaded


def shares(loaded: Loaded, wanted: bool, longest: int) -> bool:
    """Whether a model takes a prompt once for sequences of up to `longest` tokens: where rotations follow a sequence's
    length, a shared prompt would be turned otherwise than one alone."""
    turning = [part for part in loaded.model.modules() if isinstance(part, Steady)]
    return wanted and loaded.support.tree and all(part.steady(1, longest) for part in turning)


def branching(built: Built, wanted: bool, longest: int) -> Built:
    """A model that is given branches where it `shares`, and nowhere else."""
    loaded = built.loaded
    support = replace(loaded.support, tree=shares(loaded, wanted, longest))
    return replace(built, loaded=replace(loaded, support=support))
