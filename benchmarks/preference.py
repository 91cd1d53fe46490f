"""What DPO makes of held-out pairs of hh-rlhf, by rewards and by plain log-probabilities.

    python benchmarks/preference.py --data harmless-base-test.jsonl.gz --out /tmp/dpo --steps 40

Rows are held out by prompt. Figures are those of the result, and how often the chosen answer is the likelier one for
the model alone, before and after; before training all rewards are 0, and by them half of the pairs right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from held_pairs import asked_of, sources, tell

from llmkit import Preference, run
from llmkit.core.types import interval
from llmkit.stats.bootstrap import difference, ratio

BETA = 0.1


def node(asked: argparse.Namespace) -> Preference:
    """The stage."""
    return Preference(
        model=asked.model,
        adapter={"kind": "lora", "rank": 16, "alpha": 32},
        loss={"kind": "dpo", "beta": BETA},
        reference="precomputed",
        data=sources(asked),
        batch={"pairs": asked.pairs},
        steps=asked.steps,
        optim={"kind": "adamw", "lr": asked.rate},
        schedule={"kind": "cosine", "warmup": 0.1},
        evaluate={"rows": asked.held, "samples": 0},
        checkpoint={"every": 10},
        seed=asked.seed,
        out=str(asked.out / "run"),
    )


def likelier(folder: Path, seed: int) -> None:
    """Tells how often the chosen answer is the likelier one, before and after, and the paired difference."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    clusters = [row["cluster_id"] for row in rows]
    after = np.array([row["scores"]["logps_chosen"] - row["scores"]["logps_rejected"] for row in rows])
    before = after - np.array([row["scores"]["reward_margin"] for row in rows]) / BETA
    was, now = (before > 0).astype(float), (after > 0).astype(float)
    for made in (
        ratio("likelier before", was, None, clusters, seed=seed),
        ratio("likelier after", now, None, clusters, seed=seed),
        difference("likelier, after - before", (now, None), (was, None), clusters, seed=seed),
    ):
        print(f"{made.metric} {made.value:.4f} {interval(made.low, made.high, '.4f')}, n {made.n}")


def main() -> None:
    """Trains and tells."""
    asked = asked_of(__doc__, steps=40, max_length=128, rate=1e-4)
    artifact = run(node(asked))
    tell(artifact)
    likelier(artifact.folder, asked.seed)


if __name__ == "__main__":
    main()
