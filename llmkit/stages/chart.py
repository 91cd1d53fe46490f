"""Line charts as SVG, which a page holds and which read on light and on dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df")
STYLE = 'font-size="11" font-family="system-ui" fill="#6e7781"'
STEEP = 20.0
"""A chart whose largest value is so many times its smallest has a logarithmic axis."""
MOST = 1000
"""Points of a line that are drawn: of a longer one every so manyth."""
Point = tuple[float, float]
Band = Sequence[tuple[float, float, float]]
"""(x, low, high)."""


def number(value: Any) -> str:
    """A figure as it is shown."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    unit: str = "step",
    bands: Mapping[str, Band] | None = None,
) -> str:
    """A line chart as SVG; each series is a list of (x, y), and around those of `bands` lies what they range over."""
    series = {name: thinned([p for p in line if math.isfinite(p[1])]) for name, line in series.items()}
    around = {name: thinned([p for p in (bands or {}).get(name, ()) if all(map(math.isfinite, p))]) for name in series}
    points = [point for line in series.values() for point in line]
    points += [(x, y) for band in around.values() for x, *both in band for y in both]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    steep = unit != "step" and low > 0 and high > STEEP * low
    foot, head = (math.log(low), math.log(high)) if steep else (low, high)
    wide, tall = max(right - left, 1e-12), max(head - foot, 1e-12)

    def place(x: float, y: float) -> str:
        return f"{50 + 430 * (x - left) / wide:.1f},{180 - 150 * ((math.log(y) if steep else y) - foot) / tall:.1f}"

    drawn, keys = [], []
    for (name, line), colour in zip(series.items(), COLOURS, strict=False):
        if band := around[name]:
            rim = [place(x, top) for x, _, top in band] + [place(x, bottom) for x, bottom, _ in reversed(band)]
            drawn.append(f'<polygon fill="{colour}" fill-opacity="0.15" points="{" ".join(rim)}"/>')
        if line:
            path = " ".join(place(x, y) for x, y in line)
            drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
            keys.append(f'<tspan fill="{colour}">{html.escape(name)} </tspan>')
    axes = (
        f'<text x="4" y="34">{number(high)}</text><text x="4" y="182">{number(low)}</text>'
        f'<text x="50" y="200">{left:g}</text><text x="480" y="200" text-anchor="end">{unit} {right:g}</text>'
    )
    shown = f"{title} (log scale)" if steep else title
    label = f'<text x="50" y="18" font-weight="600" fill="currentColor">{html.escape(shown)} </text>'
    legend = f'<text x="480" y="18" text-anchor="end">{"".join(keys)}</text>' if len(keys) > 1 else ""
    return f'<figure><svg viewBox="0 0 500 208" {STYLE}>{label}{legend}{axes}{"".join(drawn)}</svg></figure>'


def thinned(points: Sequence[tuple[float, ...]]) -> list[Any]:
    """At most so many of them, evenly apart, with the last one."""
    every = -(-len(points) // MOST)
    return [*points[:-1:every], points[-1]] if every > 1 else list(points)
