"""How far answers reach that are drawn, and whether the model has positions for them."""

from __future__ import annotations

import numpy as np

from llmkit.core.errors import RecipeError
from llmkit.data.prepare import Prepared
from llmkit.models.positions import positions
from llmkit.models.resolve import Resolved
from llmkit.stages.from_rollouts import FromRollouts


def check_reach(node: FromRollouts, resolved: Resolved, made: Prepared) -> None:
    """
    Raises:
        RecipeError: behind the longest prompt there are fewer positions than an answer may take.
    """
    there, rollout = positions(resolved, node.model.rope), node.rollout
    if not there or rollout.vllm is not None:
        return
    lengths = np.diff(made.starts)
    longest = int(lengths.argmax())
    prompt, room = int(lengths[longest]), node.data.max_length
    most = room if rollout.environment is not None else min(prompt + rollout.max_tokens, room)
    if most > there:
        file, line = made.places[longest]
        what = f"{most - prompt} tokens behind the {prompt} of the prompt in {file}:{line} are past the {there}"
        what = f"{what} positions of {resolved.name}, and the engine draws no further"
        raise RecipeError(what, fix=f"set data.max_length={there}", key="rollout.max_tokens")
