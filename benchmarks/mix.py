"""How far the shares of a mix are from those asked, over any million tokens of a run.

    python benchmarks/mix.py [--tokens 5000000]

Sources are drawn as training draws them, with rows of lengths that make it hard; for each stretch of a million tokens
the share of each source is compared with the one that was asked for.
"""

from __future__ import annotations

import argparse
import random

import numpy as np

from llmkit.data.mix import Turns, shares

LENGTHS = {
    "64, and 2048 in all but the first": lambda rng, source: 2048 if source else 64,
    "2 to 2048": lambda rng, source: rng.randint(2, 2048),
    "40 or 2048": lambda rng, source: rng.choice([40, 2048]),
    "33, and 2048 in 5 %": lambda rng, source: 2048 if rng.random() < 0.05 else 33,
}
WEIGHTS = ([1, 1], [9, 1], [6, 2, 1, 0.5, 0.5], [93, 1, 1, 1, 1, 1, 1, 1])


def drawn(kind: str, weights: list[float], tokens: int) -> tuple[list[int], list[int]]:
    """The source and the length of each row of a run."""
    rng, turns, asked = random.Random(0), Turns(), shares(weights, 1.0)
    sources, lengths = [], []
    while tokens > 0:
        sources.append(turns.next(asked))
        lengths.append(LENGTHS[kind](rng, sources[-1]))
        turns.drawn(sources[-1], lengths[-1], asked)
        tokens -= lengths[-1]
    return sources, lengths


def worst(sources: list[int], lengths: list[int], asked: list[float], window: int = 1_000_000) -> float:
    """The largest difference between a share and what was asked, over all stretches of `window` tokens."""
    total = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.searchsorted(total, total + window)
    starts = np.flatnonzero(ends < len(total))
    off = 0.0
    for source, share in enumerate(asked):
        own = np.concatenate([[0], np.cumsum(np.where(np.array(sources) == source, lengths, 0))])
        here = (own[ends[starts]] - own[starts]) / (total[ends[starts]] - total[starts])
        off = max(off, float(np.abs(here - share).max()))
    return off


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--tokens", type=int, default=5_000_000)
    tokens = asked.parse_args().tokens
    print("| rows of | weights | worst difference of a share over any million tokens |\n|---|---|---|")
    for kind in LENGTHS:
        for weights in WEIGHTS:
            off = worst(*drawn(kind, weights, tokens), shares(weights, 1.0))
            print(f"| {kind} | {', '.join(map(str, weights))} | {off:.3%} |")


if __name__ == "__main__":
    main()
