"""Flags whose values are written as in a recipe."""

from __future__ import annotations

import re
from typing import Any

from llmkit.core.convert import spelled
from llmkit.core.errors import RecipeError
from llmkit.core.hints import kind_of, options
from llmkit.core.scalars import Origin, Value
from llmkit.core.wording import Report
from llmkit.inference.speculation.node import Speculation
from llmkit.recipe.parse import parse

SPECULATION = "What drafts: ngram[:CORPUS], draft:MODEL, early_exit:LAYERS, head:FOLDER, or '{kind: ...}'."
KEYED = re.compile(r"([a-z][a-z0-9_]*):(\S.*)")


def tree_of(said: str, flag: str) -> Any:
    """A value, read as YAML.

    Raises:
        RecipeError: it is none.
    """
    report = Report()
    made = parse(said, flag, report, flag)
    report.stop_if_bad()
    return made


def speculation_of(said: str) -> Any:
    """What drafts: KIND, KIND:WHAT, or as a recipe has it. Its kind is in it, so that it replaces another.

    Raises:
        RecipeError: it is none of these.
    """
    if not said.strip() or re.fullmatch(r"\w+:\s*", said):
        what = f"{said.strip()} is empty after its colon" if said.strip() else "is empty"
        raise RecipeError(what, fix="use ngram, or KIND:WHAT as in head:runs/head", key="--speculation")
    origin, found = Origin("command line"), KEYED.fullmatch(said)
    if found is None:
        made = tree_of(said, "--speculation")
    elif found[1] in map(kind_of, options(Speculation)):
        made = Value({found[1]: Value(found[2], origin, quoted=False)}, origin, keys={found[1]: origin})
    else:
        made = Value(found[1], origin, quoted=False)
    return spelled(options(Speculation), made) if isinstance(made.held, dict) else made
