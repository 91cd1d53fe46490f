"""The page over all stages of a pipeline: a row each, and what their evaluations measured side by side."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.core.artifact import Artifact
from llmkit.core.errors import RecipeError
from llmkit.core.files import write_atomic, write_json
from llmkit.core.folder import read_status
from llmkit.core.metrics import Lines
from llmkit.core.types import interval, named
from llmkit.stages.chart import number
from llmkit.stages.page import figures, page
from llmkit.stages.slices import drawings, drawn
from llmkit.stages.tables import table

NAME = "stages.json"


def remember(folder: Path, stages: Sequence[tuple[str, Any]]) -> None:
    """Leaves the pipeline's order in its folder, for whoever reads it later."""
    write_json(folder / NAME, {"stages": [{"name": name, "kind": node.kind} for name, node in stages]})


def order(folder: Path) -> list[tuple[str, str]]:
    """(name, kind) of a pipeline's stages; nothing where there is no pipeline.

    Raises:
        RecipeError: the list of them is no list of ours.
    """
    try:
        said = json.loads((folder / NAME).read_text("utf-8"))
        return [(str(Path(stage["name"]).name), str(stage["kind"])) for stage in said["stages"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as cause:
        what = f"is no list of stages ({cause!r:.80})"
        raise RecipeError(what, fix="run the pipeline again", file=str(folder / NAME)) from cause


def write_overview(folder: Path) -> Path:
    """Writes the pipeline's page."""
    stages = order(folder)
    rows = [_row(folder, name, kind) for name, kind in stages]
    evaluated = {name: Lines(folder / name / "evals.jsonl").read() for name, _ in stages}
    head = "".join(f"<th>{name}</th>" for name in ("stage", "kind", "state", "figures"))
    body = f"<h2>Stages</h2><table><tr>{head}</tr>{''.join(rows)}</table>"
    path = folder / "report.html"
    known = {name: lines for name, lines in evaluated.items() if lines}
    write_atomic(path, page(folder.name, [body, _beside(known), drawings(known)]).encode())
    return path


def _row(folder: Path, name: str, kind: str) -> str:
    stage, shown = folder / name, html.escape(name)
    said = read_status(stage)
    why = f": {said['why']}" if said.get("why") else ""
    state = f"{said.get('state', 'not begun')}{why}"
    if (stage / "report.html").is_file():
        shown = f'<a href="{html.escape(name)}/report.html">{shown}</a>'
    known = "<br>".join(html.escape(f"{key} {value}") for key, value in _figures(stage).items())
    return f"<tr><td>{shown}</td><td>{html.escape(kind)}</td><td>{html.escape(state)}</td><td>{known}</td></tr>"


def _figures(stage: Path) -> dict[str, str]:
    """What tells how a stage went."""
    rows = figures(Lines(stage / "metrics.jsonl").read(), Lines(stage / "evals.jsonl").read())
    manifest = Artifact(stage).manifest if (stage / "manifest.json").is_file() else {}
    merged = {"logit difference": number(manifest["logit_difference"])} if "logit_difference" in manifest else {}
    return {name: value for name, value, _ in rows} | merged


def _beside(evaluated: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row for each metric, a column for each stage that evaluates."""
    if not evaluated:
        return ""
    cells = {
        name: {
            named(e["metric"], e["slice"]): f"{number(e['value'])} {interval(e['low'], e['high'])}"
            for e in lines
            if not drawn(e)
        }
        for name, lines in evaluated.items()
    }
    keys = list(dict.fromkeys(key for found in cells.values() for key in found))
    rows = [(key, *(found.get(key, "") for found in cells.values())) for key in keys]
    return table("Evaluations, with 95 % intervals", ("", *cells), rows)
