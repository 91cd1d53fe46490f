"""Pairs on a page: whether margins are to be trusted, what lengths have to do with them, and some to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.core.types import interval
from llmkit.stages.chart import chart, number
from llmkit.stages.tables import shortened, table
from llmkit.stats.bins import edges, placed
from llmkit.stats.bootstrap import ratio

SHOWN = 5
"""Pairs that are shown of the lowest margins and of the highest."""
BINS = 10
"""Of sureness, with equally many pairs each."""
LENGTHS = 5
"""Buckets of how much longer the chosen answer is, with equally many pairs each."""
CASES = 1000
"""Pairs from which on intervals take too long to draw: they are of so many, evenly over all."""


@dataclass(frozen=True)
class Pair:
    """A row of `predictions.jsonl` that is a pair."""

    row: Mapping[str, Any]
    margin: float
    longer: float
    """Tokens that the chosen answer has more than the other."""

    @property
    def right(self) -> float:
        """1 where the chosen answer is preferred, half where both are alike."""
        return 1.0 if self.margin > 0 else 0.5 if self.margin == 0 else 0.0


def pairs_of(path: Path) -> list[Pair]:
    """The pairs of a table of predictions, of a policy or of a reward model."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [one for row in map(json.loads, file) if (one := pair_of(row)) is not None]


def pair_of(row: Mapping[str, Any]) -> Pair | None:
    """A row of a table of predictions as a pair, where it is one."""
    scores = row["scores"]
    if "reward_margin" in scores and "length_chosen" in scores:
        return Pair(row, float(scores["reward_margin"]), float(scores["length_chosen"] - scores["length_rejected"]))
    if {"chosen", "rejected", "tokens_chosen"} <= scores.keys():
        margin = float(scores["chosen"]) - float(scores["rejected"])
        return Pair(row, margin, float(scores["tokens_chosen"] - scores["tokens_rejected"]))
    return None


def shown_pairs(path: Path) -> str:
    """All of it; nothing where there are no pairs."""
    pairs = [one for one in pairs_of(path) if np.isfinite(one.margin)]
    return _calibration(pairs) + _by_length(pairs) + _read(pairs) if pairs else ""


def _calibration(pairs: Sequence[Pair]) -> str:
    """How often it is right where it is how sure: on the line, where sigmoid of the margin is to be trusted."""
    right = np.array([one.right for one in pairs])
    said = 1 / (1 + np.exp(-np.abs([one.margin for one in pairs])))
    at = placed(said, edges(said, min(BINS, len(said))))
    was = [(float(said[at == bin].mean()), float(right[at == bin].mean())) for bin in np.unique(at)]
    if len(was) < 2:
        return ""
    ends = [(was[0][0], was[0][0]), (was[-1][0], was[-1][0])]
    drawn = chart("share that is right, by how sure", {"pairs": was, "as sure as right": ends}, "sigmoid of the margin")
    return f"<h2>Calibration</h2><div class=grid>{drawn}</div>"


def _by_length(pairs: Sequence[Pair]) -> str:
    """Accuracy where the chosen answer is shorter, as long and longer, with intervals over clusters."""
    longer = np.array([one.longer for one in pairs])
    inner = [float(edge) for edge in edges(longer, LENGTHS)]
    rows = list(_buckets(pairs, longer, [-np.inf, *inner, np.inf]))
    head = ("tokens that the chosen answer is longer", "pairs", "accuracy", "")
    return table("Accuracy by difference of lengths", head, rows) if len(rows) > 1 else ""


def _buckets(pairs: Sequence[Pair], longer: np.ndarray[Any, Any], ends: Sequence[float]) -> Iterator[Sequence[str]]:
    for low, high in pairwise(ends):
        own = np.flatnonzero((longer >= low) & (longer < high))
        if len(own):
            some = own[:: -(-len(own) // CASES)].tolist()
            clusters = [str(pairs[i].row["cluster_id"]) for i in some]
            made = ratio("accuracy", [pairs[i].right for i in some], None, clusters, seed=0)
            span = f"{longer[own].min():+.0f} to {longer[own].max():+.0f}"
            yield span, str(len(own)), number(made.value), interval(made.low, made.high)


def _read(pairs: Sequence[Pair]) -> str:
    """The pairs that it is most wrong about, and most right."""
    said = sorted(pairs, key=lambda one: one.margin)
    shown = said if len(said) <= 2 * SHOWN else said[:SHOWN] + said[-SHOWN:]
    rows = [
        (*(shortened(one.row[name]) for name in ("text", "label", "prediction")), number(one.margin)) for one in shown
    ]
    return table("Pairs, by margin", ("prompt", "chosen", "preferred", "margin"), rows, pre=True)
