"""Pairs of hh-rlhf, held out by prompt: what the benchmarks of reward models and of preferences have in common."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.core.artifact import Artifact
from llmkit.core.types import interval


def prompt_of(row: dict[str, str]) -> str:
    """What both transcripts begin with, up to the answer in which they part."""
    sides = row["chosen"], row["rejected"]
    size = next((at for at, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
    return sides[0][: sides[0].rfind("\n\nAssistant:", 0, size + 1)]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The pairs, each with a hash of its prompt as its cluster."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield row | {"cluster": hashlib.sha256(prompt_of(row).encode()).hexdigest()[:16]}


def split(path: Path, held: int, out: Path) -> dict[str, int]:
    """Writes `train.jsonl` and `valid.jsonl`, with whole prompts of about `held` pairs in the second."""
    rows = list(rows_of(path))
    sizes, chosen, taken = Counter(row["cluster"] for row in rows), set[str](), 0
    for cluster in sorted(sizes):
        if taken < held:
            chosen.add(cluster)
            taken += sizes[cluster]
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid"):
        mine = [row for row in rows if (row["cluster"] in chosen) == (name == "valid")]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    return {"train": len(rows) - taken, "valid": taken}


def sources(asked: argparse.Namespace) -> dict[str, Any]:
    """Both files as a recipe's data."""
    made = {name: [{"kind": "jsonl", "path": str(asked.out / f"{name}.jsonl")}] for name in ("train", "valid")}
    return {**made, "max_length": asked.max_length}


def asked_of(told: str | None, **defaults: float) -> argparse.Namespace:
    """What the command line says; the split is written."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--held", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=16)
    for name, value in {"steps": 120, "max_length": 512, "rate": 2e-4, "seed": 0, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    asked = parser.parse_args()
    print(split(asked.data, asked.held, asked.out))
    return asked


def tell(artifact: Artifact) -> None:
    """The figures of a run, with their intervals."""
    for line in (artifact.folder / "evals.jsonl").read_text().splitlines():
        said = json.loads(line)
        print(f"{said['metric']} {said['value']:.4f} {interval(said['low'], said['high'], '.4f')}, n {said['n']}")
