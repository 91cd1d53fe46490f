"""`llmkit status`: what became of a run. Launchers do not pass exit statuses on; scripts ask here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.core.folder import is_held, read_status
from llmkit.core.metrics import Lines

DIED = 6
"""Of a run that says `running` and that no process holds: its main rank is gone without a word."""


def status(target: str, overrides: Sequence[str], as_json: bool, trace: int = 0) -> int:
    """Prints the state of a recipe's run or of a folder's; the exit status is the run's own.

    With `trace` the run is asked for a trace of so many steps; the exit status says then whether it could be asked.

    Raises:
        RecipeError: the recipe is broken, or a trace is wanted of a run that does not run.
    """
    found = state(_folders(target, overrides))
    if trace:
        _ask(found, trace)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        why = f": {found['why']}" if found["why"] else ""
        sys.stdout.write(f"{found['folder']}: {found['state']} at step {found['step']}{why}\n")
    return 0 if trace else int(found["exit_code"])


def _ask(found: dict[str, Any], steps: int) -> None:
    from llmkit.stages.profiled import FOLDER, ask

    if not found["alive"]:
        what = f"{found['folder']} is {found['state']}: no process runs that could make a trace"
        raise RecipeError(what, fix="start it, then ask")
    ask(Path(found["folder"]), steps)
    sys.stderr.write(f"llmkit: asked for a trace of {steps} steps, in {found['folder']}/{FOLDER}\n")


def _folders(target: str, overrides: Sequence[str]) -> list[Path]:
    """Those of all stages, in their order."""
    if target.endswith((".yaml", ".yml")):
        from llmkit.recipe.load import load_recipe

        return [Path(node.out) for _, node in load_recipe(target, overrides).stages]
    if overrides:
        raise RecipeError("overrides are for a recipe", fix="name a recipe, or the folder alone")
    from llmkit.stages.overview import order

    return [Path(target, name) for name, _ in order(Path(target))] or [Path(target)]


def state(folders: Sequence[Path]) -> dict[str, Any]:
    """That of the first stage that is not done, else of the last one."""
    told = list(map(_one, folders))
    return next((one for one in told if one["state"] != "done"), told[-1])


def _trained(folder: Path) -> int:
    """The last step that a run has told of."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        steps = [line["step"] for line in Lines(folder / "metrics.jsonl").read() if line.get("event") == "train"]
        return int(steps[-1])
    return 0


def _one(folder: Path) -> dict[str, Any]:
    said = read_status(folder)
    name, why, alive = said.get("state", "absent"), said.get("why", ""), is_held(folder)
    codes = {"done": 0, "stopped": 75, "running": 1 if alive else DIED, "failed": said.get("exit_code") or 1}
    if name == "running" and not alive:
        why = "no process holds it any more"
    path = folder / "status.json"
    return {
        "folder": str(folder),
        "state": name,
        "step": max(said.get("step", 0), _trained(folder) if name == "running" else 0),
        "exit_code": codes.get(name, 1),
        "why": why,
        "alive": alive,
        "written": path.stat().st_mtime_ns if path.is_file() else 0,
    }
