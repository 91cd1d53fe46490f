"""How often a reward model is right on held-out pairs of hh-rlhf, beside length alone.

    python benchmarks/reward.py --data harmless-base-test.jsonl.gz --out /tmp/reward --steps 120

Rows are held out by prompt. Figures are those of the result; what length alone gives rests on no model.
"""

from __future__ import annotations

import argparse

from held_pairs import asked_of, sources, tell

from llmkit import Reward, run


def node(asked: argparse.Namespace) -> Reward:
    """The stage."""
    return Reward(
        model=asked.model,
        adapter={"kind": "lora", "rank": 16, "alpha": 32},
        loss={"kind": "bradley_terry", "center": 0.01},
        data=sources(asked),
        batch={"pairs": asked.pairs},
        steps=asked.steps,
        optim={"kind": "adamw", "lr": asked.rate},
        evaluate={"rows": asked.held},
        checkpoint={"every": 20},
        seed=asked.seed,
        out=str(asked.out / "run"),
    )


if __name__ == "__main__":
    tell(run(node(asked_of(__doc__))))
