"""Adapters as a command line names them."""

from __future__ import annotations

from collections.abc import Iterable

from llmkit.core.errors import RecipeError


def named(said: Iterable[str]) -> dict[str, str]:
    """NAME=FOLDER, each, as name -> folder.

    Raises:
        RecipeError: one is not of that form.
    """
    made = {}
    for one in said:
        name, equals, folder = one.partition("=")
        if not (name and equals and folder) or "." in name:
            raise RecipeError(f"{one} is not NAME=FOLDER", fix="write --adapter NAME=FOLDER", key="--adapter")
        made[name] = folder
    return made
