"""A page that needs no other file, and the figures that tell how a stage went."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmkit.core.types import interval, named
from llmkit.stages.chart import number
from llmkit.stages.slices import drawn

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
