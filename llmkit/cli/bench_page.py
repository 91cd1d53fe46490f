"""The figures of a load as lines and as one self-contained page."""

from __future__ import annotations

import bisect
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmkit.core.errors import one_line
from llmkit.stages.chart import chart
from llmkit.stages.page import page
from llmkit.stages.tables import table

Point = tuple[float, float]
TIMES = {
    "ttft": "time to first token",
    "itl": "between pieces",
    "itl_mean": "between tokens, mean of a request",
    "e2e": "to the end",
}
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
APART = ("requests", "tokens", "drafted", "accepted", "a step", "ttft", "a token", "to end")
"""Of a category: counts, tokens a step, and medians in seconds."""


def lines(result: Mapping[str, Any]) -> list[str]:
    """For a terminal."""
    made = [f"{name:<34}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in _times(result)]
    head = f"{'seconds':<34}" + "".join(f"{name:>10}" for name in COLUMNS)
    apart = [f"{name[:33]:<34}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in _categories(result)]
    if apart:
        apart.insert(0, f"{'category':<34}" + "".join(f"{name:>10}" for name in APART))
    return [*(f"{name}: {value}" for name, value in _facts(result)), head, *made, *apart, *_warnings(result)]


def page_of(result: Mapping[str, Any]) -> str:
    """The page."""
    warnings = "".join(f"<p><b>{line}</b></p>" for line in map(html.escape, _warnings(result)))
    parts = [
        warnings,
        table("Figures", ("", "value"), _facts(result)),
        table("Seconds", ("", *COLUMNS), _times(result)),
        *([table("By category", ("", *APART), _categories(result))] if result["categories"] else []),
        "<h2>Over the run</h2><div class=grid>" + "".join(_charts(result)) + "</div>",
        table("Errors", ("", "requests"), [(what, str(n)) for what, n in result["errors"].items()]),
        table("Load", ("", "value"), [(name, str(value)) for name, value in result["load"].items()]),
    ]
    return page(f"bench serve: {result['model']}", parts)


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts, rates, tokens = result["requests"], result["per_second"], result["tokens"]
    asked = f"{counts['done']} of {counts['measured']} answered, {counts['refused_429']} refused with 429"
    rows = [
        ("server", f"{result['url']}, model {one_line(result['model'])}"),
        ("requests", f"{asked}, {counts['failed']} failed; {counts['warmup']} before them left out"),
        ("throughput", f"{rates['requests']:.3g} requests/s, {rates['completion_tokens']:.4g} output tokens/s"),
        ("tokens", f"{tokens['prompt']} in, {tokens['completion']} out, counted by the {tokens['counted_by']}"),
    ]
    if (drafts := result["drafts"]) is not None and drafts["drafted"]:
        told = f"{drafts['accepted']} of {drafts['drafted']} were right ({drafts['acceptance']:.1%})"
        rows.append(("drafts", f"{told}, {drafts['tokens_a_step']:.2f} tokens a step"))
    if (good := result["goodput"]) is not None:
        bounds = ", ".join(f"{name} {value:g} s" for name, value in good["slo"].items())
        rows.append(("goodput", f"{good['per_second']:.3g} requests/s, {good['share']:.1%} of all, within {bounds}"))
    rows += [("failed", f"{n} x {one_line(what)}") for what, n in result["errors"].items()]
    return rows


def _times(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    known = [(name, result[key]) for key, name in TIMES.items() if result[key] is not None]
    known += [(f"client: {name}", result["client"][key]) for key, name in _own(result)]
    return [(name, *(f"{spread[column]:.4f}" for column in COLUMNS)) for name, spread in known]


def _categories(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of their table; what is not known is a dash."""
    made = []
    for name, own in result["categories"].items():
        drafts = own["drafts"] or {}
        middles = [own[key]["p50"] if own[key] is not None else None for key in ("ttft", "itl_mean", "e2e")]
        counts = [own["done"], own["completion_tokens"], drafts.get("drafted"), drafts.get("accepted")]
        cells = [*counts, _to(drafts.get("tokens_a_step"), 2), *(_to(value, 4) for value in middles)]
        made.append((one_line(name), *("-" if cell is None else str(cell) for cell in cells)))
    return made


def _to(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _own(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = (("delay", "sent late"), ("lag", "woke late"))
    return [(key, name) for key, name in names if result["client"][key] is not None]


def _warnings(result: Mapping[str, Any]) -> list[str]:
    own = result["client"]
    told = [f"{name} {own[key]['p99']:.3f} s (p99)" for key, name in _own(result)]
    late = (
        f"the client was late: {', '.join(told)}; its own time is in these figures: use fewer requests or a free core"
    )
    short = f"{own['short']} requests failed for want of something on the client's side: they say nothing of the server"
    return [late] * own["late"] + [short] * bool(own["short"])


def _charts(result: Mapping[str, Any]) -> Iterable[str]:
    shots = [shot for shot in result["shots"] if shot["number"] >= result["load"]["warmup"]]
    good = [shot for shot in shots if not shot["error"]]
    if not good:
        return
    first = [(shot["began"], shot["times"][0] - shot["began"]) for shot in good]
    gaps = sorted(b - a for shot in good for a, b in zip(shot["times"], shot["times"][1:], strict=False))
    yield chart("time to first token, by when it was asked", {"": first}, "s")
    ends = {"time to first token": [y for _, y in first], "to the end": [s["ended"] - s["began"] for s in good]}
    yield chart("share of requests", {name: _shares(values) for name, values in ends.items()}, "%")
    yield chart("between pieces, share of pieces", {"": _shares(gaps)}, "%")
    yield chart("requests in flight", {"": _flying(shots)}, "s")
    yield chart("output tokens a second", {"": _flow([t for shot in good for t in shot["times"]])}, "s")


def _shares(values: Iterable[float]) -> list[Point]:
    """(percent, value) of sorted values, some two hundred at most."""
    ordered = sorted(values)
    steps = max(1, len(ordered) // 200)
    return [(100 * (at + 1) / len(ordered), ordered[at]) for at in range(0, len(ordered), steps)]


def _flying(shots: Sequence[Mapping[str, Any]]) -> list[Point]:
    began, ended = sorted(shot["began"] for shot in shots), sorted(shot["ended"] for shot in shots)
    return [(at, float(bisect.bisect(began, at) - bisect.bisect(ended, at))) for at in _grid(began[0], ended[-1])]


def _flow(times: Sequence[float]) -> list[Point]:
    ordered = sorted(times)
    grid = _grid(ordered[0], ordered[-1])
    edges = [bisect.bisect(ordered, at) for at in grid]
    width = max(grid[1] - grid[0], 1e-9)
    return [(at, (b - a) / width) for at, a, b in zip(grid, edges, edges[1:], strict=False)]


def _grid(low: float, high: float) -> list[float]:
    return [low + (high - low) * step / 100 for step in range(101)]
