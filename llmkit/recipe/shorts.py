"""Kinds that are short for a stage with a loss: `kind: dpo` is `kind: preference` with `loss: {kind: dpo}`."""

from __future__ import annotations

from dataclasses import replace

from llmkit.core.convert import under
from llmkit.core.hints import kind_of
from llmkit.core.scalars import Value
from llmkit.core.wording import Report, text_of
from llmkit.recipe.kinds import SHORT


def full(kind: str) -> str:
    """The kind of the stage that a name is of."""
    return kind_of(SHORT[kind]) if kind in SHORT else kind


def whole(tree: Value, report: Report, key: str = "") -> Value:
    """A stage with its kind and its loss's, where the name of the loss stood for both."""
    said = tree.held.get("kind")
    if said is None or said.held not in SHORT:
        return tree
    origin, given = said.origin, tree.held.get("loss", Value({}, said.origin))
    named = given.held.get("kind") if isinstance(given.held, dict) else given
    if named is not None and named.held != said.held:
        what = f"is {text_of(named)}, and kind {said.held} names the loss already"
        report.add(what, f"drop it, or set kind: {full(said.held)}", under(key, "loss"), named.origin)
        return replace(tree, held={**tree.held, "kind": replace(said, held=full(said.held))})
    rest, keys = (given.held, given.keys) if isinstance(given.held, dict) else ({}, {})
    loss = replace(given, held={**rest, "kind": Value(said.held, origin)}, keys={**keys, "kind": origin}, bare=None)
    held = {**tree.held, "kind": replace(said, held=full(said.held)), "loss": loss}
    return replace(tree, held=held, keys={"loss": origin, **tree.keys})
