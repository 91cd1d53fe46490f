"""What a stage reads beside its model and its data, as it is known by: what is elsewhere may become another thing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.core.convert import under
from llmkit.core.errors import RecipeError
from llmkit.core.files import sha256
from llmkit.core.own import own_of
from llmkit.core.walk import each
from llmkit.losses.own_node import OwnPairs, OwnTokens
from llmkit.losses.own_policy_node import OwnPolicy
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve_at
from llmkit.rl.environment_node import OwnEnvironment

ESCAPES = (OwnPairs, OwnPolicy, OwnTokens, OwnEnvironment)
"""Nodes that run code of the user's own in this process."""


def known(models: Mapping[str, ModelRef], files: Mapping[str, str]) -> dict[str, Any]:
    """By their keys: where models come from, and the digests of files.

    Raises:
        ModelError: a model is not there.
        RecipeError: a file cannot be read.
    """
    made: dict[str, Any] = {key: resolve_at(ref, key).facts() for key, ref in models.items()}
    return made | {key: {"sha256": _digest(path, key)} for key, path in files.items()}


def known_code(node: Any) -> dict[str, Any]:
    """The digests of code of the user's own that a stage runs in this process, as it runs it, by their keys."""
    return {under(key, "ref"): {"sha256": own_of(one).code.digest} for key, one in each(node, ESCAPES)}


def _digest(path: str, key: str) -> str:
    try:
        return sha256(Path(path).expanduser())
    except OSError as cause:
        what = f"{path} cannot be read ({cause.strerror or cause})"
        raise RecipeError(what, fix="name a file that is there", key=key) from cause
