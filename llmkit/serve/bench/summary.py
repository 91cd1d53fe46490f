"""The figures of a load that was carried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmkit.core.errors import RecipeError
from llmkit.serve.bench.drive import Driven
from llmkit.serve.bench.load import Load
from llmkit.serve.bench.shot import Shot

SHARES = (50, 90, 95, 99)
LATE = 0.01
"""Seconds by which the client may be late, at its 99th percentile, before the figures are said to hold its own time."""
BOUNDS: Mapping[str, Callable[[Shot], float]] = {
    "ttft": lambda shot: shot.first,
    "itl": lambda shot: shot.between,
    "itl_max": lambda shot: max(shot.gaps, default=0.0),
    "e2e": lambda shot: shot.whole,
}
"""What `--slo` can bound of a request: time to the first token, the mean and the longest between tokens, to the end."""


def bounds(text: str) -> dict[str, float]:
    """Reads `ttft:0.5,itl:0.1`, in seconds.

    Raises:
        RecipeError: it says something else.
    """
    made: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition(":")
        try:
            made[name] = float(value)
        except ValueError:
            made[name] = -1.0
        if name not in BOUNDS or not made[name] > 0:
            fix = f"give seconds for {', '.join(BOUNDS)}, such as ttft:0.5,itl:0.1"
            raise RecipeError(f"{part[:80]} bounds nothing", fix=fix, key="--slo")
    return made


def summary(load: Load, driven: Driven, slo: Mapping[str, float]) -> dict[str, Any]:
    """All of it, as one JSON object; times in seconds. The window of rates is from the first measured request's
    beginning to the last one's end."""
    shots = [shot for shot in driven.shots if shot.number >= load.warmup]
    good = [shot for shot in shots if shot.good]
    window = max((shot.ended for shot in shots), default=0.0) - min((shot.began for shot in shots), default=0.0)
    prompt, made = sum(shot.prompt_tokens for shot in good), sum(shot.tokens for shot in good)
    within = [shot for shot in good if all(BOUNDS[name](shot) <= most for name, most in slo.items())]
    return {
        "requests": counts(load, shots),
        "errors": dict(Counter(shot.error for shot in shots if not shot.good).most_common(20)),
        "window": window,
        "ttft": spread([shot.first for shot in good]),
        "itl": spread([gap for shot in good for gap in shot.gaps]),
        "itl_mean": spread([shot.between for shot in good if len(shot.times) > 1]),
        "e2e": spread([shot.whole for shot in good]),
        "tokens": {
            "prompt": prompt,
            "completion": made,
            "counted_by": "server" if all(shot.completion_tokens for shot in good) else "pieces",
        },
        "per_second": {
            "requests": _rate(len(good), window),
            "completion_tokens": _rate(made, window),
            "tokens": _rate(prompt + made, window),
        },
        "goodput": {
            "slo": dict(slo),
            "requests": len(within),
            "share": len(within) / len(shots) if shots else 0.0,
            "per_second": _rate(len(within), window),
        }
        if slo
        else None,
        "drafts": drafts(good),
        "categories": categories(shots),
        "client": client(shots, driven.lags, open=not load.concurrency),
    }


def counts(load: Load, shots: Sequence[Shot]) -> dict[str, int]:
    """What became of them."""
    return {
        "warmup": load.warmup,
        "measured": len(shots),
        "done": sum(shot.good for shot in shots),
        "refused_429": sum(shot.status == 429 for shot in shots),
        "failed": sum(not shot.good and shot.status != 429 for shot in shots),
    }


def drafts(good: Sequence[Shot]) -> dict[str, Any] | None:
    """What came of drafts, by what the server says with each answer; none where it says nothing of them. Tokens a step
    count the one that each step chooses by itself, too."""
    known = [shot for shot in good if shot.accepted is not None]
    if not known:
        return None
    kept, made = sum(shot.accepted or 0 for shot in known), sum(shot.completion_tokens for shot in known)
    looked = kept + sum(shot.rejected for shot in known)
    return {
        "drafted": looked,
        "accepted": kept,
        "acceptance": kept / looked if looked else None,
        "tokens_a_step": made / (made - kept) if made > kept else None,
    }


def categories(shots: Sequence[Shot]) -> dict[str, Any]:
    """The figures of each category, by its name, in the order in which they came; nothing where there are none."""
    made = {}
    for name in dict.fromkeys(shot.category for shot in shots if shot.category):
        own = [shot for shot in shots if shot.category == name]
        good = [shot for shot in own if shot.good]
        made[name] = {
            "requests": len(own),
            "done": len(good),
            "completion_tokens": sum(shot.tokens for shot in good),
            "drafts": drafts(good),
            "ttft": spread([shot.first for shot in good]),
            "itl_mean": spread([shot.between for shot in good if len(shot.times) > 1]),
            "e2e": spread([shot.whole for shot in good]),
        }
    return made


def client(shots: Sequence[Shot], lags: Sequence[float], open: bool) -> dict[str, Any]:
    """How late the client itself was: in sending, and in waking to read."""
    delay = spread([shot.delay for shot in shots] if open else [])
    lag = spread(lags)
    late = any(one is not None and one["p99"] > LATE for one in (delay, lag))
    return {"delay": delay, "lag": lag, "late": late, "short": sum(shot.ours for shot in shots)}


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles (linear between neighbours) and the largest; none of nothing."""
    if not len(values):
        return None
    found = {f"p{share}": float(value) for share, value in zip(SHARES, np.percentile(values, SHARES), strict=True)}
    return {"n": len(values), "mean": float(np.mean(values)), **found, "max": float(np.max(values))}


def _rate(count: int, window: float) -> float:
    return count / window if window > 0 else 0.0
