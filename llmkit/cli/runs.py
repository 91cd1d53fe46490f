"""The verbs that look at finished work: report, diff, runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmkit.core.artifact import Artifact
from llmkit.core.errors import RecipeError
from llmkit.core.folder import differences, read_status
from llmkit.core.metrics import Lines
from llmkit.stages.overview import order, write_overview
from llmkit.stages.report import write_report


def _run(folder: str) -> Path:
    path = Path(folder)
    if not (path / "status.json").is_file():
        raise RecipeError(f"{folder} is no run's folder", fix="`llmkit runs` lists them")
    return path


def report(folder: str) -> None:
    """Writes a run's page; of a pipeline, each stage's and the one over all of them."""
    path = Path(folder)
    if (path / "status.json").is_file():
        sys.stdout.write(f"{write_report(path)}\n")
        return
    listed = [path / name for name, _ in order(path)]
    stages = [stage for stage in listed or sorted(path.glob("*")) if (stage / "status.json").is_file()]
    for stage in stages or [_run(folder)]:
        sys.stdout.write(f"{write_report(stage)}\n")
    if listed:
        sys.stdout.write(f"{write_overview(path)}\n")


def diff(a: str, b: str, as_json: bool) -> None:
    """Prints each key whose value differs."""
    found = differences(facts(_run(a)), facts(_run(b)))
    if as_json:
        sys.stdout.write(json.dumps({key: [old, new] for key, old, new in found}) + "\n")
        return
    for key, old, new in found:
        sys.stdout.write(f"{key}: {_short(old)} -> {_short(new)}\n")
    if not found:
        sys.stdout.write("nothing differs\n")


def facts(folder: Path) -> dict[str, Any]:
    """What a run was made from and what it reached."""
    manifest = Artifact(folder).manifest if (folder / "manifest.json").is_file() else {}
    kept = {
        key: value for key, value in manifest.items() if key not in ("files", "finished", "recipe_digest", "reports")
    }
    lines = Lines(folder / "metrics.jsonl").read()
    last = {line["event"]: line for line in lines if line["event"] in ("train", "evaluate")}
    results = {name: value for line in last.values() for name, value in line.items() if name in ("loss", "valid.loss")}
    scores = {line["metric"]: line["value"] for line in Lines(folder / "evals.jsonl").read()}
    return {**kept, "result": results | scores, "state": read_status(folder).get("state")}


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) < 80 else text[:77] + "..."


def runs(folder: str, as_json: bool) -> None:
    """A line for each run below a folder."""
    rows = []
    for status in sorted(Path(folder).rglob("status.json")):
        said, lines = read_status(status.parent), Lines(status.parent / "metrics.jsonl").read()
        losses = [line["loss"] for line in lines if line["event"] == "train"]
        valid = [line["valid.loss"] for line in lines if line["event"] == "evaluate"]
        manifest = status.parent / "manifest.json"
        kind = json.loads(manifest.read_text()).get("kind", "") if manifest.is_file() else ""
        steps = said.get("step") or len(losses)
        rows.append((str(status.parent), kind, said.get("state"), steps, losses[-1:], valid[-1:]))
    if as_json:
        names = ("folder", "kind", "state", "step", "loss", "valid_loss")
        flat = [dict(zip(names, (*row[:4], *(v[0] if v else None for v in row[4:])), strict=True)) for row in rows]
        sys.stdout.write(json.dumps({"runs": flat}) + "\n")
        return
    if not rows:
        sys.stdout.write(f"no runs below {folder}\n")
        return
    from rich.console import Console
    from rich.table import Table

    # a loss that is not finite is text: JSON has no such number
    table = Table("run", "kind", "state", "step", "loss", "valid.loss", box=None)
    for name, kind, state, step, loss, valid in rows:
        table.add_row(name, kind, str(state), str(step), *(f"{float(v[0]):.4f}" if v else "" for v in (loss, valid)))
    Console(file=sys.stdout).print(table)
