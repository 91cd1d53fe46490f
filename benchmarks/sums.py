"""What training a policy on sums came to: held-out sums answered in the format and rightly, before and after.

    llmkit run recipes/policy/grpo.yaml out=/tmp/grpo
    python benchmarks/sums.py --run /tmp/grpo

Each sum of the held-out split once, its likeliest answer, asked as `data.valid` of the recipe asks. `number` is how
often the last number of the answer is right, in whatever words.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from llmkit import LLM, Sampling, load_recipe
from llmkit.core.types import interval
from llmkit.data.rows import Raw
from llmkit.stats.bootstrap import difference, ratio

ANSWER = re.compile(r"\s*<answer>\s*(-?\d+)\s*</answer>\s*")


def key(row: Raw) -> str:
    """What the last question is, hashed."""
    return hashlib.sha256(json.dumps(row.values["prompt"][-1]).encode()).hexdigest()


def judged(model: str, rows: list[Raw], most: int) -> dict[str, list[float]]:
    """Of each row, whether its likeliest answer is in the format, right in it, and right in whatever words."""
    found: dict[str, list[float]] = {"format": [], "exact": [], "number": []}
    with LLM(model) as llm:
        said = llm.generate([row.values["prompt"] for row in rows], Sampling(max_tokens=most))
    for row, one in zip(rows, said, strict=True):
        made, numbers = ANSWER.fullmatch(one.text), re.findall(r"-?\d+", one.text)
        found["format"].append(float(made is not None))
        found["exact"].append(float(made is not None and int(made[1]) == int(row.values["answer"])))
        found["number"].append(float(bool(numbers) and int(numbers[-1]) == int(row.values["answer"])))
    return found


def main() -> None:
    """Asks both and tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", help="of the run, where it is not its result: the folder of a checkpoint's model")
    parser.add_argument("--draws", type=int, default=1000, help="of the held-out split, of which each sum counts once")
    asked = parser.parse_args()
    ((_, node),) = load_recipe(str(asked.run / "recipe.yaml")).stages
    (valid,), (train,) = node.data.sources("valid"), node.data.sources("train")
    rows = {key(row): row for row in _of(valid, asked.draws)}
    shared = rows.keys() & {key(row) for row in _of(train, train.take)}
    print(f"{len(rows)} held-out sums, {len(shared)} of them among those trained on")
    before, after = (
        judged(model, list(rows.values()), node.rollout.max_tokens)
        for model in (node.model.name, asked.model or str(asked.run))
    )
    for name, was in before.items():
        now = after[name]
        for made in (
            ratio(f"{name} before", was),
            ratio(f"{name} after", now),
            difference(f"{name}, after - before", (now, None), (was, None)),
        ):
            print(f"{made.metric} {made.value:.4f} {interval(made.low, made.high, '.4f')}, n {made.n}")


def _of(source: Any, take: int) -> list[Raw]:
    from llmkit.data.arithmetic import read

    return list(read(source.split, take, source.most, (), shown=source.shown))


if __name__ == "__main__":
    main()
