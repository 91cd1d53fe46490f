"""The verbs that look at finished work: report, diff, runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from llmkit.core.artifact import Artifact
from llmkit.core.environment import prepare
from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.folder import differences, is_held, read_status
from llmkit.core.metrics import Lines
from llmkit.core.types import named
from llmkit.core.wording import yaml_word
from llmkit.stages.card import card
from llmkit.stages.overview import order, write_overview
from llmkit.stages.push import Push
from llmkit.stages.report import write_report
from llmkit.stages.upload import files


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


def push(folder: str, repo: str, public: bool, dry_run: bool) -> None:
    """Sends the result of a run to the Hub, or says what would be sent."""
    path = _run(folder)
    node = Push(repo=repo, private=not public)
    if read_status(path).get("state") != "done":
        raise ModelError("is not finished", fix="finish it first: run its recipe again", file=folder)
    artifact = Artifact(path)
    artifact.verify("model/")
    if not (path / "model").is_dir():
        raise ModelError("leaves no model", fix="push a run that trains or merges", file=folder)
    if dry_run:
        names = "".join(f"  {name} ({file.stat().st_size / 2**20:.1f} MiB)\n" for name, file in files(path))
        sys.stdout.write(f"{repo}:\n{names}  README.md:\n\n{card(path)}")
        return
    prepare(remote=True)
    sys.stdout.write(f"{node.send(path)}\n")


def facts(folder: Path) -> dict[str, Any]:
    """What a run was made from and what it reached."""
    manifest = Artifact(folder).manifest if (folder / "manifest.json").is_file() else {}
    kept = {
        key: value for key, value in manifest.items() if key not in ("files", "finished", "recipe_digest", "reports")
    }
    lines = _lines(folder / "metrics.jsonl")
    last = {line["event"]: line for line in lines if line.get("event") in ("train", "evaluate")}
    results = {name: value for line in last.values() for name, value in line.items() if name in ("loss", "valid.loss")}
    scores = {named(line["metric"], line["slice"]): line["value"] for line in _lines(folder / "evals.jsonl")}
    return {**kept, "result": results | scores, "state": read_status(folder).get("state")}


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else yaml_word(value)
    return text if len(text) < 80 else text[:77] + "..."


def runs(folder: str, as_json: bool) -> None:
    """A line for each run below a folder; a broken one says what is broken.

    Raises:
        RecipeError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise RecipeError(f"{folder} is no folder", fix="name the folder that holds the runs")
    rows = [_row(status.parent) for status in sorted(Path(folder).rglob("status.json"))]
    if as_json:
        sys.stdout.write(json.dumps({"runs": rows}) + "\n")
        return
    if not rows:
        sys.stdout.write(f"no runs below {folder}\n")
        return
    table = [("run", "kind", "state", "step", "loss", "valid.loss"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells, why in zip(table, ["", *(row["why"] if row["state"] == "broken" else "" for row in rows)], strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        sys.stdout.write(f"{line}  {why}".rstrip() + "\n")


def _row(folder: Path) -> dict[str, Any]:
    """What is told of a run."""
    row = {"folder": str(folder), "kind": _kind(folder), "state": "broken", "step": 0, "loss": None, "valid_loss": None}
    try:
        said = read_status(folder)
        if "state" not in said:
            raise ModelError("cannot be read", file=str(folder / "status.json"))
        if (folder / "manifest.json").is_file():
            _ = Artifact(folder).manifest
        lines = _lines(folder / "metrics.jsonl")
    except ModelError as broken:
        return {**row, "why": str(broken)}
    losses = [line.get("loss") for line in lines if line.get("event") == "train"]
    valid = [line.get("valid.loss") for line in lines if line.get("event") == "evaluate"]
    killed = said["state"] == "running" and not is_held(folder)
    row |= {"state": "killed" if killed else said["state"], "step": said.get("step") or len(losses)}
    return row | {"loss": _last(losses), "valid_loss": _last(valid), "why": said.get("why", "")}


def _kind(folder: Path) -> str:
    """The kind of a run, which is in its recipe from the beginning."""
    try:
        found = re.search(r"^kind: (\w+)", (folder / "resolved.yaml").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return ""
    return found[1] if found else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [line for line in Lines(path).read() if isinstance(line, dict)]
    except (OSError, ValueError) as cause:
        raise ModelError("is damaged: a line is not JSON", fix="run the stage again", file=str(path)) from cause


def _last(values: list[Any]) -> Any:
    return values[-1] if values else None


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    numbers = (f"{v:.4f}" if isinstance(v, float) else str(v or "") for v in (row["loss"], row["valid_loss"]))
    return (row["folder"], row["kind"], str(row["state"]), str(row["step"]), *numbers)
