"""`report.html`: one self-contained page with curves, figures, settings and samples."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.core.files import write_atomic
from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.core.types import Report, interval
from llmkit.stages.curves import curves
from llmkit.stages.page import figures, page
from llmkit.stages.shown_answers import shown_answers
from llmkit.stages.shown_pairs import pair_of, shown_pairs
from llmkit.stages.shown_rounds import shown_rounds
from llmkit.stages.slices import drawings
from llmkit.stages.tables import table

MOST_CLASSES = 24
"""Classes of a confusion matrix that are shown."""


def write_report(folder: Path) -> Path:
    """Writes the page of one stage's folder."""
    lines = Lines(folder / "metrics.jsonl").read()
    samples = Lines(folder / "samples.jsonl").read()
    evals = Lines(folder / "evals.jsonl").read()
    known = figures(lines, evals)
    answers, bands = shown_answers(folder)
    parts = [
        table("Figures", ("", "value", ""), known) if known else "",
        answers,
        curves(lines, bands),
        drawings({"": evals}),
        shown_rounds(folder),
        _samples(samples),
        _confusions(folder / "predictions.jsonl"),
        _predictions(folder / "predictions.jsonl"),
        shown_pairs(folder / "predictions.jsonl"),
        _lint(folder / "lint.json"),
        _settings(folder / "resolved.yaml"),
    ]
    path = folder / "report.html"
    write_atomic(path, page(folder.name, parts).encode())
    return path


def write_reports(run: Run, reports: Iterable[Report]) -> None:
    """Leaves figures with their intervals in `evals.jsonl`, and tells them."""
    path = run.folder / "evals.jsonl"
    path.unlink(missing_ok=True)
    lines = Lines(path)
    for report in reports:
        lines.add(vars(report))
        shown = f"{report.metric} {report.value:.4f}" + (f" ({report.slice})" if report.slice != "all" else "")
        run.console.notice(f"{shown} {interval(report.low, report.high, '.4f')}, n {report.n}")


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    first, last = samples[0]["step"], samples[-1]["step"]
    before = {s["prompt"]: s["answer"] for s in samples if s["step"] == first}
    rows = [
        (s["prompt"], s["expected"], before.get(s["prompt"], ""), s["answer"]) for s in samples if s["step"] == last
    ]
    return table("Samples", ("prompt", "expected", f"step {first}", f"step {last}"), rows, pre=True)


def _confusions(path: Path) -> str:
    """What classifiers said of each class, task by task."""
    counts: dict[str, Counter[tuple[str, str]]] = {}
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                if row["slices"].get("kind") == "classification":
                    counts.setdefault(row["slices"]["task"], Counter())[row["label"], row["prediction"]] += 1
    return "".join(_confusion(name, found) for name, found in counts.items())


def _confusion(name: str, found: Counter[tuple[str, str]]) -> str:
    """A row for each class, a column for each that was said; of many classes those that are most often there."""
    often = Counter[str]()
    for pair, n in found.items():
        often.update({one: n for one in pair})
    classes = sorted(label for label, _ in often.most_common(MOST_CLASSES))
    rows = [(label, *(str(found[label, said] or "") for said in classes)) for label in classes]
    left = f", the {MOST_CLASSES} largest of {len(often)} classes" if len(often) > MOST_CLASSES else ""
    return table(f"Confusion: {name} (rows are, columns said{left})", ("", *classes), rows)


def _predictions(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8") as file:
        said = [json.loads(line) for line, _ in zip(file, range(4000), strict=False)]
    said = [row for row in said if row["prediction"] and pair_of(row) is None]
    rows = [(row["text"], row["label"], row["prediction"]) for row in said[:10]]
    return table("Answers", ("prompt", "expected", "answer"), rows, pre=True) if rows else ""


def _lint(path: Path) -> str:
    """What was odd about the rows, and how many of their tokens are whose."""
    if not path.is_file():
        return ""
    said = json.loads(path.read_text("utf-8"))
    rows = [
        (key, f["level"], f["name"], str(f["count"]), f["what"], f["fix"], "\n".join(map(_place, f["places"])))
        for key, found in said["findings"].items()
        for f in found
    ]
    head = ("data", "", "finding", "rows", "what", "way out", "where")
    shares = [(role, f"{share:.1%}") for role, share in said["shares"].items()]
    made = table("Lint", head, rows, pre=True) if rows else ""
    return made + (table("Share of tokens", ("role", "about"), shares) if shares else "")


def _place(place: Mapping[str, Any]) -> str:
    return f"{place['file']}:{place['line']}" + (f" ({place['detail']})" if place["detail"] else "")


def _settings(path: Path) -> str:
    if not path.is_file():
        return ""
    return f"<h2>Settings</h2><pre>{html.escape(path.read_text('utf-8'))}</pre>"
