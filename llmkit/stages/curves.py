"""The curves of a stage: its losses and figures over steps, of rollouts with the band of their groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmkit.stages.chart import Band, Point, chart

Line = Mapping[str, Any]
"""One line of `metrics.jsonl`."""
TOGETHER = {
    "rewards of a pair": ("reward_chosen", "reward_rejected"),
    "log-probabilities of a pair": ("logps_chosen", "logps_rejected"),
    "tokens of a pair": ("length_chosen", "length_rejected"),
}
"""Figures that are seen in one chart."""
FIRST = ("reward_margin", "accuracy", "reward")
"""What a stage is for: behind its loss."""
LAST = ("grad_norm", "lr", "tokens_per_second")
UNDRAWN = {
    *("event", "step", "epoch", "loss", "tokens", "supervised_tokens", "samples", "seconds", "mfu"),
    *("peak_memory_bytes", *LAST, *FIRST, *(name for names in TOGETHER.values() for name in names)),
}
"""What is no curve of its own."""


def curves(lines: Sequence[Line], bands: Mapping[str, Band]) -> str:
    """All of them; `bands` are what figures range over within groups of answers, by their names."""
    trained = [line for line in lines if line["event"] == "train"]
    seen = [line for line in lines if line["event"] == "evaluate"]
    if not trained:
        return ""
    made = "".join(_charts(trained, seen, bands))
    told = "Shaded: from a group's lowest answer to its highest, in the mean over the groups of a step."
    return f"<h2>Curves</h2>{f'<p class=k>{told}</p>' if bands else ''}<div class=grid>{made}</div>"


def _charts(trained: Sequence[Line], seen: Sequence[Line], bands: Mapping[str, Band]) -> Iterator[str]:
    yield chart("loss", _both(trained, seen, "loss"))
    if right := {name: _points(seen, name) for name in (seen or [{}])[0] if name.startswith("valid.right_")}:
        yield chart("drafts that are right", right)
        yield chart("tokens a step", {"validation": _points(seen, "valid.tokens_per_step")})
    own = dict.fromkeys(name for line in (trained[0], trained[-1]) for name in line if name not in UNDRAWN)
    for name in (*FIRST, *(key for key in own if not isinstance(trained[-1].get(key), str))):
        if _points(trained, name):
            band = {"training": bands[name]} if name in bands else None
            yield chart(name, _both(trained, seen, name), bands=band)
    for title, names in TOGETHER.items():
        yield chart(title, {name.rpartition("_")[2]: _points(trained, name) for name in names})
    for name in LAST:
        yield chart(name, {name: _points(trained, name)})


def _both(trained: Sequence[Line], seen: Sequence[Line], name: str) -> dict[str, list[Point]]:
    return {"training": _points(trained, name), "validation": _points(seen, f"valid.{name}")}


def _points(lines: Iterable[Line], name: str) -> list[Point]:
    return [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
