"""Does held-out loss fall on real data sets? A short LoRA on each, evaluated on rows that it never saw.

    python benchmarks/held_out.py --data FOLDER [--steps 30]

FOLDER holds gsm8k/train.jsonl, self-instruct/seed_tasks.jsonl and hh-rlhf/harmless-base-test.jsonl.gz.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = """
kind: sft
model: smollm2-135m-instruct-q4
data:
  train: [{{kind: jsonl, path: {folder}/train.jsonl}}]
  valid: [{{kind: jsonl, path: {folder}/valid.jsonl}}]
  max_length: 512
  overflow: truncate
batch: {{rows: 8}}
steps: {steps}
optim: {{kind: adamw, lr: 5e-4}}
evaluate: {{rows: 48, samples: 0}}
out: {folder}/run
"""


def gsm8k(data):
    """Question -> answer."""
    for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield turns(row["question"], row["answer"])


def self_instruct(data):
    """Instruction and input -> output."""
    for line in (data / "self-instruct" / "seed_tasks.jsonl").read_text().splitlines():
        row = json.loads(line)
        for instance in row["instances"][:1]:
            yield turns("\n".join(filter(None, [row["instruction"], instance["input"]])), instance["output"])


def hh_rlhf(data):
    """The chosen transcripts, as messages."""
    with gzip.open(data / "hh-rlhf" / "harmless-base-test.jsonl.gz", "rt") as file:
        for line in file:
            parts = json.loads(line)["chosen"].split("\n\nHuman:")[1:]
            said = [turn for part in parts for turn in exchange(part)]
            if said and said[-1]["role"] == "assistant" and all(turn["content"] for turn in said):
                yield {"messages": said}


def exchange(part):
    """One question and what was answered."""
    asked, _, answered = part.partition("\n\nAssistant:")
    yield {"role": "user", "content": asked.strip()}
    yield {"role": "assistant", "content": answered.strip()}


def turns(question, answer):
    """A row of two messages."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    print("| data | rows trained on | held-out loss before | after |\n|---|---|---|---|")
    for make in (gsm8k, self_instruct, hh_rlhf):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = [json.dumps(row) + "\n" for row in make(options.data)]
            held = [row for index, row in enumerate(rows) if index % 8 == 0][:96]
            kept = [row for index, row in enumerate(rows) if index % 8][:2000]
            (folder / "train.jsonl").write_text("".join(kept))
            (folder / "valid.jsonl").write_text("".join(held))
            (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, steps=options.steps))
            subprocess.run(
                [sys.executable, "-m", "llmkit", "run", folder / "recipe.yaml"], check=True, capture_output=True
            )
            lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
            losses = [line["valid.loss"] for line in lines if line["event"] == "evaluate"]
            seen = min(len(kept), 8 * options.steps)
            print(f"| {make.__name__} | {seen} | {losses[0]:.4f} | {losses[-1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
