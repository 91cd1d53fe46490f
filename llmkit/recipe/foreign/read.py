"""Reading a foreign configuration: its keys with their lines, and which tool it is of."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from llmkit.core.errors import RecipeError
from llmkit.core.scalars import Value
from llmkit.core.wording import Report
from llmkit.recipe.foreign import axolotl, llama_factory, trl
from llmkit.recipe.foreign.draft import Draft
from llmkit.recipe.parse import parse_file

TOOLS: dict[str, Callable[[Draft], None]] = {
    "axolotl": axolotl.convert,
    "llama-factory": llama_factory.convert,
    "trl": trl.convert,
}
NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?|\d+\.")


def imported(path: Path, tool: str = "") -> Draft:
    """The recipe that a configuration becomes, with what became of each of its keys.

    Raises:
        RecipeError: it cannot be read, is of no tool that is known, or trains in a way that has no stage.
    """
    report = Report()
    root = parse_file(path, report)
    report.stop_if_bad()
    said = plain(root)
    if not isinstance(said, dict):
        raise RecipeError("is no mapping", fix="give a configuration of another tool", file=str(path), line=1)
    lines = {key: place.line for key, place in root.keys.items()}
    name = tool or _tool(said, path)
    draft = Draft(name, said, lines, path.parent)
    try:
        TOOLS[name](draft)
    except RecipeError as cause:
        problem = cause.problems[0]
        if not problem.file:
            raise RecipeError(problems=[replace(problem, file=str(path))]) from cause
        raise
    except (AttributeError, TypeError, ValueError, KeyError) as cause:  # a shape that the tool itself would refuse
        what = f"is no configuration of {name} ({type(cause).__name__}: {cause})"
        raise RecipeError(what, fix="check it with that tool", file=str(path), line=1) from cause
    draft.close()
    return draft


def plain(value: Value) -> Any:
    """A tree of plain values, scalars read as YAML 1.1 has them, and 1e-4 as the number that was meant."""
    held = value.held
    if isinstance(held, dict):
        return {key: plain(item) for key, item in held.items()}
    if isinstance(held, list):
        return [plain(item) for item in held]
    if value.quoted or not isinstance(held, str):
        return held
    if NUMBER.fullmatch(held) and "e" in held.lower():
        return float(held)
    try:
        said = yaml.safe_load(held) if held else None
    except yaml.YAMLError:
        return held
    return said if isinstance(said, str | int | float | bool | None) else held


def _tool(said: dict[str, Any], path: Path) -> str:
    if "kind" in said or "stages" in said:
        raise RecipeError("is a recipe of ours already", fix=f"llmkit run {path}", file=str(path), line=1)
    if "base_model" in said:
        return "axolotl"
    if "model_name_or_path" in said and ("finetuning_type" in said or "cutoff_len" in said or "stage" in said):
        return "llama-factory"
    if "model_name_or_path" in said:
        return "trl"
    what = "is of no tool that is known: no base_model (axolotl), no model_name_or_path (LLaMA-Factory, TRL)"
    raise RecipeError(what, fix=f"say which with --tool: {', '.join(TOOLS)}", file=str(path), line=1)
