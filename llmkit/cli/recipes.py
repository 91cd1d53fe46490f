"""The verbs that work on a recipe: run, check, show, evaluate, merge."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.core.errors import RecipeError
from llmkit.core.ranks import ranks
from llmkit.core.run import Grants

if TYPE_CHECKING:
    from llmkit.recipe.load import Recipe


def out(text: str) -> None:
    """One line of result, on standard output."""
    sys.stdout.write(text + "\n")


def run(recipe: str, overrides: Sequence[str], resume: str, grants: Grants) -> None:
    """Runs a recipe."""
    from llmkit.recipe.load import load_recipe

    _execute(load_recipe(recipe, overrides), resume, grants)


def _execute(recipe: Recipe, resume: str = "auto", grants: Grants | None = None) -> None:
    from llmkit.recipe.execute import run as execute

    if resume not in ("auto", "never") and not (Path(resume) / "manifest.json").is_file():
        raise RecipeError(f"--resume {resume} is no checkpoint", fix="use auto, never, or a checkpoint's folder")
    artifact = execute(recipe, resume=resume, grants=grants or Grants())
    if ranks().main:
        out(str(artifact.folder))


def check(recipe: str, overrides: Sequence[str], show: int, python: bool) -> None:
    """Parses, renders and accounts."""
    from llmkit.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from llmkit.cli.inspect import inspect, present
    from llmkit.recipe.told import named

    with named(loaded, ""):
        present(loaded.stages)
    made: list[str] = []
    for name, node in loaded.stages:
        with named(loaded, name):
            inspect(name, node, show, made, python)
        made.append(node.out)


def show(recipe: str, overrides: Sequence[str], as_json: bool, schema: bool) -> None:
    """Prints the resolved recipe, or the schema of all recipes."""
    if schema:
        from llmkit.recipe.schema import schema as made

        out(json.dumps(made(), indent=1))
        return
    if not recipe:
        raise RecipeError("show needs a recipe", fix="give a file, or --schema")
    from llmkit.recipe.load import load_recipe
    from llmkit.recipe.show import deepspeed, resolved, values

    loaded = load_recipe(recipe, overrides)
    zero = deepspeed(loaded)
    if not as_json:
        sys.stdout.write(resolved(loaded))
        for name, config in zero.items():
            text = json.dumps(config, indent=2).replace("\n", "\n# ")
            out(f"# DeepSpeed configuration{f' of stage {name}' if name else ''}:\n# {text}")
        return
    origins = {key: str(origin) for key, origin in loaded.origins.items() if key}
    out(json.dumps({"recipe": values(loaded), "origins": origins} | ({"deepspeed": zero} if zero else {})))


def evaluate(target: str, overrides: Sequence[str], tasks: str, to: str) -> None:
    """Runs an `evaluate` recipe, or named tasks over a model."""
    from llmkit.recipe.load import Recipe, load_recipe

    if target.endswith((".yaml", ".yml")):
        recipe = load_recipe(target, overrides)
        if any(node.kind != "evaluate" for _, node in recipe.stages):
            raise RecipeError(f"{target} does more than evaluate", fix=f"use llmkit run {target}", key="kind")
        _execute(recipe)
        return
    from llmkit.core.scalars import Origin
    from llmkit.core.types import interval, named
    from llmkit.evals.tasks import NAMED
    from llmkit.stages.evaluate import Evaluate

    names = [name for name in tasks.split(",") if name]
    unknown = [name for name in names if name not in NAMED]
    if unknown or not names:
        wrong = f"{unknown[0]} is no named task" if unknown else "no task is named"
        raise RecipeError(wrong, fix=f"use --tasks {','.join(NAMED)}, or write a recipe")
    folder = to or f"runs/evaluate-{Path(target).name}"
    node = Evaluate(model=target, tasks=[task for name in names for task in NAMED[name]], out=folder)  # type: ignore[arg-type]
    _execute(Recipe((("", node),), {"": Origin("command line")}))
    for line in (Path(folder) / "evals.jsonl").read_text().splitlines():
        said = json.loads(line)
        name, value = named(said["metric"], said["slice"]), float(said["value"])  # text where it is not finite
        out(f"{name:32} {value:.4f}  {interval(said['low'], said['high'], '.4f')}  n {said['n']}")


def merge(model: str, to: str, precision: str) -> None:
    """Merges an adapter."""
    from llmkit.core.scalars import Origin
    from llmkit.recipe.load import Recipe
    from llmkit.stages.merge import Merge

    node = Merge(model=model, precision=precision, out=to)  # type: ignore[arg-type]
    _execute(Recipe((("", node),), {"": Origin("command line")}))
