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
from llmkit.core.types import Report, interval, named
from llmkit.stages.chart import chart, number
from llmkit.stages.slices import drawings, drawn

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid #d0d7de;padding:.35rem .6rem;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;margin:0;font-size:13px}
svg{width:100%;height:auto;background:#f6f8fa;border-radius:6px}.k{color:#59636e}figure{margin:1rem 0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1rem}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}svg{background:#161b22}
td,th{border-color:#30363d}.k{color:#9198a1}}
"""
PAIR, SHOWN_PAIRS = "preference", 5
"""The kind of a pair's row in tables, and how many are shown of the lowest margins and of the highest."""
MOST_CLASSES = 24
"""Classes of a confusion matrix that are shown."""


def write_report(folder: Path) -> Path:
    """Writes the page of one stage's folder."""
    lines = Lines(folder / "metrics.jsonl").read()
    samples = Lines(folder / "samples.jsonl").read()
    evals = Lines(folder / "evals.jsonl").read()
    known = figures(lines, evals)
    parts = [
        table("Figures", ("", "value", ""), known) if known else "",
        _curves(lines),
        drawings({"": evals}),
        _samples(samples),
        _confusions(folder / "predictions.jsonl"),
        _predictions(folder / "predictions.jsonl"),
        _pairs(folder / "predictions.jsonl"),
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


def page(name: str, parts: Iterable[str]) -> str:
    """A whole page of these parts, which needs no other file."""
    title = html.escape(name or "run")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
    head += "<meta name=viewport content='width=device-width'>"
    return f"{head}<style>{STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>\n"


def figures(lines: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what tells how a stage went."""
    rows = []
    seen = [line for line in lines if line["event"] == "evaluate"]
    if seen:
        for name in (n for n in seen[0] if n.startswith("valid.") and n != "valid.tokens"):
            rows.append((name, f"{number(seen[0][name])} → {number(seen[-1][name])}", "before → after"))
    rows += [
        (named(e["metric"], e["slice"]), number(e["value"]), f"{interval(e['low'], e['high'])}, n {e['n']}")
        for e in evals
        if not drawn(e)
    ]
    trained = [line for line in lines if line["event"] == "train"]
    if trained:
        rows.append(("steps", str(trained[-1]["step"]), ""))
    timed = [line for line in trained if "tokens_per_second" in line]  # a trainer of another library tells none
    if timed:
        speed = sorted(line["tokens_per_second"] for line in timed)[len(timed) // 2]
        top = max(line["peak_memory_bytes"] for line in timed) / 2**30
        rows += [("tokens per second", f"{speed:.0f}", "median"), ("peak memory", f"{top:.2f} GiB", "")]
    return rows


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    trained = [line for line in lines if line["event"] == "train"]
    seen = [line for line in lines if line["event"] == "evaluate"]
    if not trained:
        return ""
    loss = {"training": _points(trained, "loss"), "validation": _points(seen, "valid.loss")}
    charts = [
        ("loss", loss),
        *((name, {name: _points(trained, name)}) for name in ("grad_norm", "lr", "tokens_per_second")),
    ]
    for place, name in enumerate(("reward_margin", "accuracy")):
        if pairs := _points(trained, name):
            charts.insert(1 + place, (name, {"training": pairs, "validation": _points(seen, f"valid.{name}")}))
    if right := {name: _points(seen, name) for name in (seen or [{}])[0] if name.startswith("valid.right_")}:
        charts.insert(1, ("drafts that are right", right))
        charts.insert(2, ("tokens a step", {"validation": _points(seen, "valid.tokens_per_step")}))
    return "<h2>Curves</h2><div class=grid>" + "".join(chart(name, series) for name, series in charts) + "</div>"


def _points(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), int | float)]


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
    said = [row for row in said if row["prediction"] and row["slices"].get("kind") != PAIR]
    rows = [(row["text"], row["label"], row["prediction"]) for row in said[:10]]
    return table("Answers", ("prompt", "expected", "answer"), rows, pre=True) if rows else ""


def _pairs(path: Path) -> str:
    """The pairs that a policy is most wrong about, and most right."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8") as file:
        said = [row for row in map(json.loads, file) if row["slices"].get("kind") == PAIR]
    said = sorted(said, key=lambda row: float(row["scores"]["reward_margin"]))
    shown = said if len(said) <= 2 * SHOWN_PAIRS else said[:SHOWN_PAIRS] + said[-SHOWN_PAIRS:]
    rows = [(row["text"], row["label"], row["prediction"], number(row["scores"]["reward_margin"])) for row in shown]
    return table("Pairs, by margin", ("prompt", "chosen", "preferred", "margin"), rows, pre=True) if rows else ""


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


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], pre: bool = False) -> str:
    """A titled HTML table; every cell is escaped."""
    wrap = "<pre>{}</pre>" if pre else "{}"
    body = "".join(
        "<tr>" + "".join(f"<td>{wrap.format(html.escape(str(cell)))}</td>" for cell in row) + "</tr>" for row in rows
    )
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<h2>{html.escape(title)}</h2><table><tr>{top}</tr>{body}</table>"
