"""What tests of stages that learn from their own answers share: a small one, how it runs, and what it wrote."""

import json

from llmkit import run
from llmkit.core.console import Console
from llmkit.stages.policy import Policy

SHORT = {"kind": "length", "shape": {"kind": "target", "length": 4, "slack": 24}, "unit": "characters"}
LETTER = {"kind": "regex", "pattern": "a", "timeout": 60}
ROWS = [{"prompt": f"question {i} of the model", "answer": "a"} for i in range(12)]


def written(path, rows):
    """A file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(kind, model, rows, out, more):
    """A stage of this kind over a file of prompts, with the keys of `more` in the place of its own."""
    options = {
        "model": str(model),
        "data": {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 48},
        "reward": [SHORT],
        "optim": {"kind": "adamw", "lr": 1e-2},
        "schedule": {"kind": "constant"},
        "out": str(out),
    }
    return kind(**(options | more))


def policy(tiny, asked, out, **more):
    """A policy stage, small."""
    own = {"rollout": {"group": 4, "max_tokens": 6}, "loss": {"kind": "grpo"}, "batch": {"prompts": 3}, "steps": 3}
    return small(Policy, tiny, asked, out, own | more)


def go(node, **more):
    return run(node, console=Console(quiet=True), **more)


def lines_of(folder, name="metrics.jsonl"):
    timings = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def steps_of(folder):
    return [line for line in lines_of(folder) if line["event"] == "train"]
