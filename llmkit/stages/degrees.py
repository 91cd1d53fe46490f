"""Whether a model goes with the degrees of `parallel`: asked of its configuration, before a group forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.models.plans import plans_experts
from llmkit.parallel.fits import check_context, check_experts, check_tensor
from llmkit.parallel.node import Parallel


def check_degrees(config: Mapping[str, Any], spread: Parallel) -> None:
    """Sees to it that heads and experts of a model's `config.json` can be dealt out to ranks.

    Raises:
        RecipeError: they cannot; it names the numbers that fit.
    """
    if spread.tensor > 1:
        check_tensor(config, spread.tensor)
    if spread.context > 1:
        check_context(config, spread.context_method, spread.context, spread.tensor)
    if spread.expert > 1:
        check_experts(config, spread.expert, plans_experts(config))
