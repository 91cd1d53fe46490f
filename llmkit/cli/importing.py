"""`llmkit import`: a configuration of another tool becomes a recipe."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.core.files import write_atomic
from llmkit.recipe.foreign.draft import Draft, Fate
from llmkit.recipe.foreign.read import TOOLS, imported
from llmkit.recipe.foreign.write import said, text
from llmkit.recipe.load import load_recipe

TITLES: Mapping[Fate, str] = {"lost": "not taken over", "changed": "not quite the same", "needless": "not needed"}


def import_config(file: str, to: str, tool: str, force: bool, as_json: bool) -> None:
    """Writes the recipe, and says what became of each key.

    Raises:
        RecipeError: the configuration cannot be read, or the recipe's file is there already.
    """
    if tool and tool not in TOOLS:
        raise RecipeError(f"{tool} is not known", fix=f"use one of {', '.join(TOOLS)}", key="--tool")
    source = Path(file)
    if not source.is_file() or not source.stat().st_size:
        what = "is empty" if source.is_file() else "is no file"
        raise RecipeError(what, fix="give a configuration of axolotl, LLaMA-Factory or TRL", file=file)
    path = Path(to or f"{source.stem}.recipe.yaml")
    draft = imported(source, tool)
    _beside(draft, path)
    files = {path: text(draft, source.name)} | {path.with_name(name): body for name, body in draft.files.items()}
    for written in files if not force else ():
        if written.exists():
            raise RecipeError("is there already", fix="give another with --to, or --force", file=str(written))
    for written, body in files.items():
        write_atomic(written, body.encode())
    problems = _problems(path)
    if as_json:
        notes = [dataclasses.asdict(note) for note in draft.notes]
        told = {"recipe": str(path), "tool": draft.tool, "notes": notes, "problems": problems}
        sys.stdout.write(json.dumps(told, default=str) + "\n")
        return
    _tell(draft, path, problems)


def _beside(draft: Draft, path: Path) -> None:
    """Files that the recipe names lie where it does."""
    model: Any = draft.recipe["model"]
    if model.get("template") in draft.files:
        model["template"] = str(path.with_name(model["template"]))


def _problems(path: Path) -> list[str]:
    try:
        load_recipe(str(path))
    except LlmkitError as cause:
        return [str(problem) for problem in cause.problems]
    return []


def _tell(draft: Draft, path: Path, problems: list[str]) -> None:
    taken = sum(note.fate == "taken" for note in draft.notes)
    parts = [f"{path}: from {draft.tool}, {taken} keys taken over"]
    for fate, title in TITLES.items():
        found = [note for note in draft.notes if note.fate == fate]
        parts += [f"{title} ({len(found)}):"] if found else []
        parts += [f"  {said(note)}" for note in found]
    parts += ["to be mended before it runs:", *(f"  {problem}" for problem in problems)] if problems else []
    sys.stdout.write("\n".join(parts) + "\n")
