"""Figures by position, and by depth and length: drawn from the slices of `evals.jsonl` as lines and heat maps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.core.types import interval
from llmkit.stages.chart import STYLE, chart, number

Line = Mapping[str, Any]
"""One line of `evals.jsonl`."""
STOPS = ((33, 49, 99), (47, 127, 143), (122, 196, 120), (253, 231, 76))
"""Of a cell's colour, from the lowest value to the highest: told apart by lightness alone too."""
SHARES = ("accuracy", "exact_match")
"""Figures between 0 and 1, whose colours are those of that whole range."""
LEFT, TOP, WIDE, TALL = 50, 34, 430, 30
"""Where the cells of a map begin, how wide they are together, and how tall each is."""


def parts(line: Line) -> dict[str, str]:
    """The slice of a figure by its keys: `length=512,depth=0.5`; nothing for all of it."""
    pairs = [pair.partition("=") for pair in str(line["slice"]).split(",")]
    return {name: value for name, sign, value in pairs if sign}


def drawn(line: Line) -> bool:
    """Whether a figure is a point of a line or a cell of a map."""
    return set(parts(line)) in ({"positions"}, {"length", "depth"})


def drawings(evaluated: Mapping[str, Sequence[Line]]) -> str:
    """By name what was evaluated: a chart for each figure that is by position, a map for each by depth and length."""
    lines = {name: [line for line in found if drawn(line)] for name, found in evaluated.items()}
    metrics = dict.fromkeys(line["metric"] for found in lines.values() for line in found)
    made = ""
    for metric in metrics:
        own = {name: [line for line in found if line["metric"] == metric] for name, found in lines.items()}
        cells = [line for found in own.values() for line in found if "depth" in parts(line)]
        if not cells:
            made += chart(metric, {name: _points(found) for name, found in own.items()}, "up to position")
            continue
        scale = scale_of(metric, cells)
        made += "".join(heat(f"{metric}, {name}" if name else metric, found, scale) for name, found in own.items())
    return f"<h2>By position and length</h2><div class=grid>{made}</div>" if made else ""


def _points(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """(where a bucket ends, its figure)."""
    return [(int(parts(line)["positions"].partition("-")[2]) + 1.0, float(line["value"])) for line in lines]


def scale_of(metric: str, cells: Sequence[Line]) -> tuple[float, float]:
    """The lowest and the highest value of a map's colours."""
    values = [float(cell["value"]) for cell in cells]
    return (0.0, 1.0) if metric.endswith(SHARES) else (min(values), max(values))


@dataclass(frozen=True)
class Grid:
    """The rows and columns of a map."""

    depths: tuple[str, ...]
    lengths: tuple[str, ...]

    def place(self, cell: Line) -> tuple[float, float]:
        """The left upper corner of a cell."""
        where = parts(cell)
        return LEFT + self.width * self.lengths.index(where["length"]), TOP + TALL * self.depths.index(where["depth"])

    @property
    def width(self) -> float:
        """Of a cell."""
        return WIDE / len(self.lengths)

    @property
    def foot(self) -> int:
        """Where the cells end."""
        return TOP + TALL * len(self.depths)


def heat(title: str, cells: Sequence[Line], scale: tuple[float, float]) -> str:
    """A map of depth (down) by length (across) as SVG, each cell labelled with its value."""
    if not cells:
        return ""
    names = [sorted({parts(cell)[key] for cell in cells}, key=float) for key in ("depth", "length")]
    grid = Grid(tuple(names[0]), tuple(names[1]))
    body = "".join(_cell(cell, grid, scale) for cell in cells)
    label = f'<text x="{LEFT}" y="18" font-weight="600" fill="currentColor">{html.escape(title)}</text>'
    frame = f'viewBox="0 0 500 {grid.foot + 40}" {STYLE}'
    return f"<figure><svg {frame}>{label}{_axes(grid)}{_legend(grid.foot + 23, *scale)}{body}</svg></figure>"


def _axes(grid: Grid) -> str:
    made = f'<text x="4" y="30">depth</text><text x="480" y="{grid.foot + 32}" text-anchor="end">tokens</text>'
    for row, depth in enumerate(grid.depths):
        made += f'<text x="{LEFT - 6}" y="{TOP + TALL * (row + 0.62):.1f}" text-anchor="end">{depth}</text>'
    for column, length in enumerate(grid.lengths):
        x = LEFT + grid.width * (column + 0.5)
        made += f'<text x="{x:.1f}" y="{grid.foot + 13}" text-anchor="middle">{length}</text>'
    return made


def _legend(y: int, low: float, high: float) -> str:
    made = f'<text x="84" y="{y + 9}" text-anchor="end">{low:.2g}</text><text x="188" y="{y + 9}">{high:.2g}</text>'
    for step in range(8):
        made += f'<rect x="{88 + 12 * step}" y="{y}" width="12" height="10" fill="{colour(step / 7)[0]}"/>'
    return made


def _cell(cell: Line, grid: Grid, scale: tuple[float, float]) -> str:
    (x, y), where, value = grid.place(cell), parts(cell), float(cell["value"])
    fill, ink = colour((value - scale[0]) / max(scale[1] - scale[0], 1e-12))
    told = f"{where['length']} tokens, depth {where['depth']}: {number(value)} "
    low, high = (None if cell[end] is None else float(cell[end]) for end in ("low", "high"))  # text where not finite
    told += f"{interval(low, high)}, n {cell['n']}"
    box = f'x="{x:.1f}" y="{y}" width="{grid.width - 1:.1f}" height="{TALL - 1}" fill="{fill}"'
    spot = f'x="{x + grid.width / 2:.1f}" y="{y + TALL * 0.62:.1f}" text-anchor="middle" fill="{ink}"'
    return f"<g><title>{html.escape(told)}</title><rect {box}/><text {spot}>{value:.3g}</text></g>"


def colour(share: float) -> tuple[str, str]:
    """The colour of a value by its share of the scale, and that of letters on it."""
    at = min(max(share, 0.0), 1.0) * (len(STOPS) - 1)
    first = min(int(at), len(STOPS) - 2)
    pairs = zip(STOPS[first], STOPS[first + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (at - first)) for a, b in pairs)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    return f"#{red:02x}{green:02x}{blue:02x}", "#111111" if light > 120 else "#ffffff"
