"""What models that are asked cannot do, by their files alone."""

from __future__ import annotations

from llmkit.core.errors import ModelError, RecipeError
from llmkit.models.node import Head, ModelRef
from llmkit.models.positions import positions
from llmkit.models.resolve import head_of, resolve_at
from llmkit.models.rewarded import judges_steps, kind_of, scores_answers


def check_scorer(ref: ModelRef, key: str) -> None:
    """
    Raises:
        ModelError: it is not there, or is none that scores whole answers.
    """
    check_head(head_of(resolve_at(ref, key)), ref.name, key)


def check_head(head: Head | None, name: str, key: str) -> None:
    """
    Raises:
        ModelError: it is none that scores whole answers.
    """
    if scores_answers(head):
        return
    if judges_steps(head):
        what = f"{name} judges steps, not whole answers"
        raise ModelError(what, fix="give what kind: reward made with task: outcome", key=key)
    raise ModelError(f"{name} is {kind_of(head)}", fix="give what kind: reward made", key=key)


def check_room(ref: ModelRef | None, max_tokens: int) -> None:
    """
    Raises:
        ModelError: the model is not there.
        RecipeError: it has no positions for so many tokens behind a prompt.
    """
    there = 0 if ref is None else positions(resolve_at(ref, "model"), ref.rope)
    if ref is not None and there and max_tokens >= there:
        what = f"{max_tokens} tokens behind a prompt are past the {there} positions of {ref.name}"
        raise RecipeError(what, fix=f"give less than {there}", key="sampling.max_tokens")
