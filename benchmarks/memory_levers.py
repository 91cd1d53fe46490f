"""What does each lever on memory save, and what does it cost?

    python benchmarks/memory_levers.py --data FOLDER [--rounds 5] [--steps 6] [--model NAME] [--rows 4] [--only TEXT]

FOLDER holds gsm8k/train.jsonl. Full fine-tuning and LoRA of the small model, plain, with each lever alone and with the
stack of them; every run is a process of its own, and each round runs all of them once, in turn. The figures are medians
over rounds of the peak memory of the process (on a GPU: of its tensors), and of tokens per second (padding excluded,
the first step left out). One step is one micro-batch everywhere and clipping is off, so that the levers alone differ.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

RECIPE = """
kind: sft
model: {model}
data:
  train: [{{kind: jsonl, path: {rows}, columns: {{prompt: question, completion: answer}}}}]
  max_length: 512
batch: {{rows: {batch}}}
micro_batch: {batch}
steps: {steps}
schedule: {{kind: constant}}
out: {out}
"""
PLAIN = {"optim": {"kind": "adamw", "lr": 1e-5, "clip": 0.0}, "memory": {"recompute": "none"}}
FULL = {
    "plain": {},
    "recompute selective": {"memory": {"recompute": "selective"}},
    "recompute full": {"memory": {"recompute": "full"}},
    "offload activations": {"memory": {"offload_activations": True}},
    "optimizer in backward": {"memory": {"optimizer_in_backward": True}},
    "adamw_8bit": {"optim": {"kind": "adamw_8bit"}},
    "adafactor": {"optim": {"kind": "adafactor", "lr": 1e-3}},
    "lion_8bit": {"optim": {"kind": "lion_8bit"}},
    "galore": {"optim": {"kind": "galore"}},
    "apollo": {"optim": {"kind": "apollo"}},
    "muon": {"optim": {"kind": "muon"}},
    "bf16": {"precision": "bf16"},
    "stack: recompute full, optimizer in backward, adamw_8bit": {
        "memory": {"recompute": "full", "optimizer_in_backward": True},
        "optim": {"kind": "adamw_8bit"},
    },
    "stack, and bf16": {
        "memory": {"recompute": "full", "optimizer_in_backward": True},
        "optim": {"kind": "adamw_8bit"},
        "precision": "bf16",
    },
}
LORA = {
    "plain": {},
    "recompute selective": {"memory": {"recompute": "selective"}},
    "recompute full": {"memory": {"recompute": "full"}},
    "offload activations": {"memory": {"offload_activations": True}},
    "bf16": {"precision": "bf16"},
    "nf4 base": {"quant": {"kind": "bnb_nf4"}},
    "stack: nf4 base, recompute full": {"quant": {"kind": "bnb_nf4"}, "memory": {"recompute": "full"}},
    "stack, and offload activations": {
        "quant": {"kind": "bnb_nf4"},
        "memory": {"recompute": "full", "offload_activations": True},
    },
}


def contenders():
    """(method, lever) -> what it sets; what this machine cannot do is left out and told."""
    made = {("full", name): {"adapter": "none", **more} for name, more in FULL.items()}
    made |= {
        ("lora", name): {"adapter": {"kind": "lora", "rank": 16, "alpha": 32}, **more} for name, more in LORA.items()
    }
    if not torch.cuda.is_available():
        away = [key for key, more in made.items() if more.get("memory", {}).get("offload_activations")]
        print(f"left out, for there is no device with a memory of its own: {', '.join(' '.join(key) for key in away)}")
        made = {key: more for key, more in made.items() if key not in away}
    return made


def once(folder, name, more, options, rows):
    """One run of `llmkit run`: (tokens per second, peak bytes)."""
    out, recipe = folder / name, folder / f"{name}.yaml"
    text = RECIPE.format(model=options.model, rows=rows, batch=options.rows, steps=options.steps, out=out)
    merged = {**PLAIN, **more}
    merged = {key: {**PLAIN[key], **value} if key in PLAIN else value for key, value in merged.items()}
    recipe.write_text(text + "".join(f"{key}: {json.dumps(value)}\n" for key, value in merged.items()))
    done = subprocess.run([sys.executable, "-m", "llmkit", "run", recipe], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)  # a hundred checkpoints would fill the disk
    train = [line for line in lines if line["event"] == "train"]
    speed = sum(line["tokens"] for line in train[1:]) / sum(line["seconds"] for line in train[1:])
    return speed, train[-1]["peak_memory_bytes"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step, each of at most 512 tokens")
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--only", default="", help="only the methods and levers that hold this text")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("the first step is left out: give --steps 2 or more")
    chosen = {key: more for key, more in contenders().items() if options.only in " ".join(key)}
    results = {key: [] for key in chosen}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = folder / "rows.jsonl"
        lines = [line for line in (options.data / "gsm8k" / "train.jsonl").read_text().splitlines() if len(line) < 1200]
        rows.write_text("\n".join(lines[:192]) + "\n")
        for number in range(options.rounds):
            for index, (key, more) in enumerate(chosen.items()):
                speed, peak = once(folder, f"run-{number}-{index}", more, options, rows)
                results[key].append((speed, peak))
                print(
                    f"round {number + 1}: {' '.join(key):60} {speed:.0f} tokens/s, {peak / 2**30:.2f} GiB", flush=True
                )
    tell(results)


def tell(results):
    """The table of medians, beside plain of the same method where that was run."""
    middle = {key: [statistics.median(column) for column in zip(*runs, strict=True)] for key, runs in results.items()}
    print("\n| method | lever | peak GiB | of plain | tokens/s | of plain |\n|---|---|---|---|---|---|")
    for (method, lever), (speed, peak) in middle.items():
        before = middle.get((method, "plain"))
        parts = ["", ""] if before is None else [f"{peak / before[1]:.0%}", f"{speed / before[0]:.0%}"]
        print(f"| {method} | {lever} | {peak / 2**30:.2f} | {parts[0]} | {speed:.0f} | {parts[1]} |")


if __name__ == "__main__":
    main()
