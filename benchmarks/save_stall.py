"""How long does the loop wait for a checkpoint, as a share of a step?

    python benchmarks/save_stall.py --data FOLDER [--steps 6] [--tokens 8192] [--model NAME] [--ranks 1]

FOLDER holds gsm8k/train.jsonl. Full fine-tuning of the 135M model with AdamW in fp32, `--tokens` tokens a step,
with a checkpoint after every second step and at the end. Two runs, each its own process, with `background: true` and
with `false`. A save is timed as `fit` sees it, by the wall time of its save hook, with the wait for the save before it;
the share is that over the median of the steps' own seconds (the first one left out). The first save makes the room for
its copy and is shown apart. `beside` is the median of the steps right after a save over that of the others: what the
thread takes from the step that it runs beside. The bar is a share of 5 % for `background: true`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
kind: sft
model: {model}
adapter: none
precision: {precision}
data:
  train: [{{kind: jsonl, path: {rows}, columns: {{prompt: question, completion: answer}}}}]
  max_length: 1024
batch: {{tokens: {tokens}}}
steps: {steps}
optim: {{kind: adamw, lr: 1.0e-5}}
schedule: {{kind: constant}}
checkpoint: {{every: 2, keep: 1, background: {background}}}
out: {out}
"""


def one(recipe, said):
    """Runs a recipe in this process and writes the seconds of each save, and the bytes of the last one."""
    from llmkit import run
    from llmkit.core.console import Console
    from llmkit.recipe.load import load_recipe
    from llmkit.stages import build_training

    real, stalls = build_training._save, []

    def timed(*args):
        began = time.perf_counter()
        real(*args)
        stalls.append([args[-2].step, time.perf_counter() - began])

    build_training._save = timed
    made = run(load_recipe(recipe), console=Console(quiet=True))
    if os.environ.get("RANK", "0") != "0":
        return
    size = sum(path.stat().st_size for path in (made.folder / "checkpoints").rglob("*.safetensors"))
    Path(said).write_text(json.dumps({"stalls": stalls, "bytes": size}))


def measured(args, background, folder):
    """The figures of one run."""
    recipe, said, out = folder / f"{background}.yaml", folder / f"{background}.json", folder / f"run-{background}"
    recipe.write_text(
        RECIPE.format(
            model=args.model,
            precision=args.precision,
            rows=Path(args.data, "gsm8k", "train.jsonl").resolve(),
            tokens=args.tokens,
            steps=args.steps,
            background=str(background).lower(),
            out=out,
        )
    )
    launch = [sys.executable]
    if args.ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    subprocess.run([*launch, __file__, "--data", args.data, "--one", str(recipe), "--said", str(said)], check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines if line["event"] == "train"}
    found = json.loads(said.read_text())
    saves = [step for step, _ in found["stalls"]]
    rest = {step: value for step, value in seconds.items() if step > 1}
    beside = [value for step, value in rest.items() if step - 1 in saves]
    apart = [value for step, value in rest.items() if step - 1 not in saves]
    middle = statistics.median(rest.values())
    first, *later = (stall for _, stall in found["stalls"])
    return {
        "background": background,
        "checkpoint_mib": round(found["bytes"] / 2**20),
        "step_seconds": round(middle, 2),
        "first_stall_seconds": round(first, 3),
        "stall_seconds": [round(stall, 3) for stall in later],
        "first_share": round(first / middle, 4),
        "share": round(max(later, default=first) / middle, 4),
        "beside": round(statistics.median(beside) / statistics.median(apart), 3) if beside and apart else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--said", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.said)
        return
    with tempfile.TemporaryDirectory() as folder:
        for background in (True, False):
            print(json.dumps(measured(args, background, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
