"""Does a scaled and briefly tuned model beat the unscaled one past its length? SmolLM2 (8,192 tokens) at 12,288.

    python benchmarks/long_context.py --data FOLDER [--out runs/long-context] [--length 12288] [--steps 8]

FOLDER holds wikitext-2/valid.txt: its first half is evaluated, its second half trained on. One pipeline, four stages:
the model as it is, scaled by YaRN, tuned for a few steps at the whole length, and that evaluated. Perplexity by
position and retrieval by depth and length are printed as a table and drawn in OUT/run/report.html.
About 15 minutes on 2 cores; `--length 1536 --lengths 512 1536 --windows 1 --samples 1 --steps 1` shows that it runs.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

RECIPE = """
# Unscaled, scaled, and scaled and tuned, past the trained length
defaults:
  seed: 0
stages:
  - {{name: unscaled, kind: evaluate, model: {model}, tasks: {tasks}}}
  - {{name: scaled, kind: evaluate, model: {{name: {model}, rope: {rope}}}, tasks: {tasks}}}
  - name: tune
    kind: sft
    model: {{name: {model}, rope: {rope}}}
    adapter: {{kind: lora, rank: 8, alpha: 16}}
    data:
      train: [{{kind: jsonl, path: {folder}/train.jsonl}}]
      train_on: all
      max_length: {length}
      overflow: split
    batch: {{rows: 1}}
    steps: {steps}
    optim: {{kind: adamw, lr: 5e-4}}
    schedule: {{kind: cosine, warmup: 0.1}}
  - {{name: tuned, kind: evaluate, model: "${{stages.tune}}", tasks: {tasks}}}
out: {folder}/run
"""
STAGES = ("unscaled", "scaled", "tuned")


def written(folder, rows, name):
    """Rows of text as jsonl."""
    path = folder / name
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def articles(text):
    """Wikitext's articles: each begins with its title between single equals signs."""
    return [part for part in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if part.strip()]


def recipe(options):
    """The pipeline, with its rows beside it."""
    found = articles((options.data / "wikitext-2" / "valid.txt").read_text("utf-8"))
    half = len(found) // 2
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    held = written(folder, found[:half], "held.jsonl")
    size = options.length * 8  # letters: more than the tokens of a window
    text = "".join(found[half:])
    written(folder, [text[at : at + size] for at in range(0, len(text) - size // 2, size)], "train.jsonl")
    tasks = [
        {
            "kind": "position_perplexity",
            "data": [{"kind": "jsonl", "path": str(held)}],
            "documents": "joined",
            "length": options.length,
            "buckets": 6,
            "rows": options.windows,
        },
        {"kind": "passkey", "lengths": options.lengths, "depths": options.depths, "samples": options.samples},
    ]
    rope = json.dumps({"kind": options.kind, "factor": options.factor})
    said = {"model": options.model, "rope": rope, "tasks": json.dumps(tasks), "length": options.length}
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(**said, folder=folder, steps=options.steps))
    return path


def table(run):
    """Every figure of every stage, with its interval where it has one."""
    found = {}
    for stage in STAGES:
        for line in (run / stage / "evals.jsonl").read_text().splitlines():
            said = json.loads(line)
            ends = "" if said["low"] is None else f" [{said['low']:.3g}, {said['high']:.3g}]"
            found.setdefault((said["metric"], said["slice"]), {})[stage] = f"{said['value']:.4g}{ends}"
    print(f"| figure | slice | {' | '.join(STAGES)} |\n|---|---|{'---|' * len(STAGES)}")
    for (metric, part), cells in found.items():
        print(f"| {metric} | {part} | {' | '.join(cells.get(stage, '') for stage in STAGES)} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/long-context"))
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--kind", default="yarn", choices=("linear", "dynamic", "yarn", "llama3"))
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--length", type=int, default=12288)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 12288])
    parser.add_argument("--depths", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    path = recipe(options)
    done = subprocess.run([sys.executable, "-m", "llmkit", "run", str(path)], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    run = path.parent / "run"
    table(run)
    print(f"drawn in {run / 'report.html'}")


if __name__ == "__main__":
    main()
