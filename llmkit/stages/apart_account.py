"""What a rank that only draws holds: a whole model, the cache of its share of answers, and a forward of the engine."""

from __future__ import annotations

from llmkit.core.shape import Shape
from llmkit.plan.beside import Beside
from llmkit.stages.companions import cache_of, forward_of, held_of
from llmkit.stages.holding import BASE
from llmkit.stages.training import Training


def drawing_parts(node: Training, shape: Shape, device: str) -> dict[str, int]:
    """Bytes by part; nothing where those who train draw too."""
    draws = node.draws(1)
    if draws is None or not draws.aside:
        return {}
    own = Beside("weights", adapter=node.adapter)
    return {
        "base": BASE[device],
        "weights": int(held_of(node, own, shape, device)),
        "cache": cache_of(node, draws, 1, shape, device),
        "drawing": forward_of(node, draws, 1, shape, device),
    }
