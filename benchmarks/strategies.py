"""What does each strategy cost over gloo, beside replicas, and what do two processes gain over one?

    python benchmarks/strategies.py [--data FOLDER] [--rounds 5] [--steps 6] [--adapter none] [--only NAMES] [--json F]

FOLDER holds gsm8k/train.jsonl; without it rows are made up. Each round runs every contender once, in turn, on the same
cores: one process has all of them as threads, and of N ranks each has its share. The figures are medians over rounds of
tokens per second (padding excluded, all ranks together, the first step left out) and of the share of `ddp` in the same
round; and the largest peak of resident memory that a rank of any round had, files that are mapped included.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from llmkit.core.ranks import Ranks, free_port

MODEL = "smollm2-135m-instruct-q4"
FSDP = {"kind": "fsdp"}
CONTENDERS = {
    "one": (1, {}),
    "ddp": (2, {"strategy": {"kind": "ddp"}}),
    "fsdp": (2, {"strategy": FSDP}),
    "fsdp kept": (2, {"strategy": FSDP | {"reshard": False}}),
    "fsdp offloaded": (2, {"strategy": FSDP | {"offload": "cpu"}}),
    "zero 3": (2, {"strategy": {"kind": "zero"}}),
    "ring": (2, {"context": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "tensor x 3": (3, {"tensor": 3}),
    "ddp x 4": (4, {"strategy": {"kind": "ddp"}}),
    "fsdp x 4": (4, {"strategy": FSDP}),
    "pipeline x 4": (4, {"pipeline": 4}),
    "pipeline 2 x ddp 2": (4, {"pipeline": 2}),
    "hybrid 2 x 2": (4, {"strategy": FSDP, "replicate": 2, "shard": 2}),
}
"""Name -> (ranks, the recipe's `parallel`): a new strategy is a line here."""
AGAINST = "ddp"
RANK = "from llmkit.cli.main import main; main()"


def rows(data, folder):
    """192 rows of prompts and completions."""
    made = folder / "rows.jsonl"
    if data:
        lines = [line for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines() if len(line) < 1200][:192]
        made.write_text("\n".join(lines) + "\n")
        return made
    drawn = random.Random(0)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sees",
        "takes",
        "red",
        "old",
        "small",
        "house",
        "road",
        "then",
        "and",
        "two",
        "apples",
    ]

    def text(size):
        return " ".join(drawn.choice(words) for _ in range(size))

    sizes = [(drawn.randint(20, 80), drawn.randint(40, 160)) for _ in range(192)]
    lines = [json.dumps({"question": text(asked), "answer": text(given)}) for asked, given in sizes]
    made.write_text("\n".join(lines) + "\n")
    return made


def recipe(folder, name, parallel, source, options):
    """A stage of full or LoRA fine-tuning in fp32, as YAML, which JSON is."""
    out = folder / name.replace(" ", "-").replace(",", "")
    columns = {"prompt": "question", "completion": "answer"}
    stage = {
        "kind": "sft",
        "model": MODEL,
        "adapter": options.adapter,
        "data": {"train": [{"kind": "jsonl", "path": str(source), "columns": columns}], "max_length": 512},
        "batch": {"rows": options.rows},
        "micro_batch": 1,
        "steps": options.steps,
        "precision": "fp32",
        "optim": {"kind": "adamw", "lr": 2e-4},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 10**6},
        "parallel": parallel,
        "out": str(out),
    }
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(stage))
    return path, out


def ran(path, out, world):
    """Runs a recipe on `world` ranks: (tokens per second, the largest peak of a rank in bytes).

    Raises:
        SystemExit: a rank failed; what it said is printed.
    """
    threads = str(max(1, (os.cpu_count() or 1) // world))
    port = free_port()
    ranks = []
    for rank in range(world):
        around = os.environ | {"OMP_NUM_THREADS": threads}
        if world > 1:
            around |= Ranks(rank, world, rank, world).environment(port)
        command = [sys.executable, "-c", RANK, "run", str(path)]
        said = Path(f"{out}-{rank}.txt")
        with said.open("w") as file:
            ranks.append((subprocess.Popen(command, env=around, stdout=file, stderr=file), said))
    peaks = []
    for process, said in ranks:
        _, status, used = os.wait4(process.pid, 0)
        peaks.append(used.ru_maxrss * 1024)
        if status:
            raise SystemExit(f"{path.stem}: {said.read_text()[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"][1:]
    speed = sum(line["tokens"] for line in steps) / sum(line["seconds"] for line in steps)
    shutil.rmtree(out)  # two gigabytes of a full fine-tuning
    return speed, max(peaks)


def measured(options, folder):
    """Of each contender what each round gave."""
    source, wanted = rows(options.data, folder), options.only.split(",") if options.only else list(CONTENDERS)
    unknown = set(wanted) - CONTENDERS.keys()
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: no contender; there are {', '.join(CONTENDERS)}")
    found = {name: [] for name in wanted}
    for turn in range(options.rounds):
        for name in wanted:
            world, parallel = CONTENDERS[name]
            place = folder / str(turn)
            place.mkdir(exist_ok=True)
            found[name].append(ran(*recipe(place, name, parallel, source, options), world))
            print(f"round {turn + 1}, {name}: {found[name][-1][0]:.1f} tokens/s", file=sys.stderr)
    return found


def table(found):
    """A line for each contender."""
    print("| strategy | ranks | tokens/s | spread | of ddp | peak of a rank |\n|---|---|---|---|---|---|")
    for name, rounds in found.items():
        speeds, peaks = zip(*rounds, strict=True)
        spread = (max(speeds) - min(speeds)) / statistics.median(speeds)
        beside = [speed / other[0] for speed, other in zip(speeds, found.get(AGAINST, ()), strict=False)]
        share = f"{statistics.median(beside):.2f}" if beside else ""
        figures = f"{statistics.median(speeds):.1f} | {spread:.0%} | {share} | {max(peaks) / 2**20:.0f} MiB"
        print(f"| {name} | {CONTENDERS[name][0]} | {figures} |")


if __name__ == "__main__":
    asked = argparse.ArgumentParser()
    asked.add_argument("--data", type=Path)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--steps", type=int, default=6)
    asked.add_argument("--rows", type=int, default=4)
    asked.add_argument("--adapter", default="none")
    asked.add_argument("--only", default="")
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = measured(given, Path(scratch))
    table(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
