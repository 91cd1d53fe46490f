"""How fast and how large is alignment, beside TRL in its own environment?

    python benchmarks/align.py --data FOLDER [--rounds 5] [--only dpo|grpo] [--quick]

FOLDER holds hh-rlhf/harmless-base-test.jsonl.gz and gsm8k/train.jsonl. DPO: pairs of about 350 + 115 tokens, LoRA r16;
GRPO: a prompt of about 100 tokens a step, 8 answers of 64 tokens, a price on divergence, a pattern as the reward. Each
round runs every contender once, in a process of its own; figures are medians over rounds, with the least and the most
of the rounds' ratios. A run's first step is left out. TRL's best is the faster of recompute on and off.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from train_sft import MODEL, peer_python
from transformers import AutoTokenizer

from llmkit.data.order import permutation
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve

PEERS = Path(__file__).parent / "peers"
PROMPT, ANSWER = 350, 115
LR = {"dpo": 1e-5, "grpo": 1e-5}
BETA = {"dpo": 0.1, "grpo": 0.04}
GROUP, TOKENS, PATTERN = 8, 64, "[0-9]"
HEAD = """
model: {model}
adapter: {{kind: lora, rank: 16, alpha: 32}}
share_prompts: {shared}
steps: {steps}
precision: fp32
optim: {{kind: adamw, lr: {lr}}}
schedule: {{kind: constant}}
out: {out}
data:
  train: [{{kind: jsonl, path: {rows}}}]
  max_length: 1024
"""
DPO = """
kind: preference
loss: {{kind: dpo, beta: {beta}}}
reference: {reference}
batch: {{pairs: {pairs}}}
"""
GRPO = """
kind: policy
rollout: {{group: {group}, max_tokens: {tokens}}}
reward: [{{kind: regex, pattern: '{pattern}'}}]
loss: {{kind: grpo, beta: {beta}}}
batch: {{prompts: 1}}
"""
CONTENDERS = {
    "dpo": {
        "llmkit": {"shared": True, "reference": "adapter_off"},
        "llmkit, prompts not shared": {"shared": False, "reference": "adapter_off"},
        "llmkit, reference precomputed": {"shared": True, "reference": "precomputed"},
        "TRL recompute (its default)": {"recompute": True, "precomputed": False},
        "TRL": {"recompute": False, "precomputed": False},
        "TRL recompute, reference precomputed": {"recompute": True, "precomputed": True},
        "TRL, reference precomputed": {"recompute": False, "precomputed": True},
    },
    "grpo": {
        "llmkit": {"shared": True},
        "llmkit, prompts not shared": {"shared": False},
        "TRL recompute (its default)": {"recompute": True},
        "TRL": {"recompute": False},
    },
}


def messages(transcript):
    """hh-rlhf's text -> the messages before the last answer, and that answer."""
    turns = []
    for part in transcript.split("\n\nHuman: ")[1:]:
        question, *answers = part.split("\n\nAssistant: ")
        turns.append({"role": "user", "content": question.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns[:-1], turns[-1:]


def pairs(source, tokenizer, count):
    """The pairs of the shape that is nearest to what is asked for."""

    def size(turns):
        return sum(len(tokenizer.encode(turn["content"])) + 5 for turn in turns)

    made = []
    with gzip.open(source, "rt") as file:
        for line in file:
            row = json.loads(line)
            try:
                (prompt, chosen), (other, rejected) = messages(row["chosen"]), messages(row["rejected"])
            except (IndexError, ValueError):
                continue
            roles = [turn["role"] for turn in (*prompt, *chosen)]
            if prompt != other or roles != ["user", "assistant"] * (len(roles) // 2) or not rejected[0]["content"]:
                continue
            far = abs(size(prompt) - PROMPT) + abs(size(chosen) - ANSWER) + abs(size(rejected) - ANSWER)
            made.append((far, {"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    made.sort(key=lambda one: one[0])
    return [row for _, row in made[:count]]


def questions(source, tokenizer, count):
    """GSM8K's questions of about 100 tokens."""
    made = [json.loads(line)["question"] for line in source.read_text().splitlines()]
    made.sort(key=lambda text: abs(len(tokenizer.encode(text)) - 80))
    return [{"prompt": [{"role": "user", "content": text}]} for text in made[:count]]


def write(folder, kind, rows):
    """The rows for us, and the same in the order in which our seed 0 takes them for TRL."""
    order = permutation(0, 0, len(rows))
    for name, said in (("ours", rows), ("theirs", [rows[i] for i in order])):
        (folder / f"{kind}.{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))


def run(command):
    """The last line of a contender, read. It writes to files: a pipe would wait for its children too."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        code = subprocess.run(command, stdout=out, stderr=errors, check=False).returncode
        told, why = (file.seek(0) or file.read() for file in (out, errors))
    if code or not told.strip():
        raise SystemExit(told[-2000:] + why[-3000:])
    return json.loads(told.splitlines()[-1])


def ours(folder, kind, steps, pairs, how):
    """One run of `llmkit run`."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        out, recipe = Path(made) / "out", Path(made) / "recipe.yaml"
        text = HEAD + (DPO if kind == "dpo" else GRPO)
        said = how | {"shared": str(how["shared"]).lower(), "out": out, "rows": folder / f"{kind}.ours.jsonl"}
        numbers = {"steps": steps, "lr": LR[kind], "beta": BETA[kind], "pairs": pairs, "group": GROUP, "tokens": TOKENS}
        recipe.write_text(text.format(model=MODEL, pattern=PATTERN, **numbers, **said))
        return run([sys.executable, PEERS / "llmkit_align.py", recipe, out])


def theirs(python, folder, kind, steps, pairs, how):
    """One run of TRL."""
    spec = {"kind": kind, "model": str(resolve(ModelRef(name=MODEL)).folder), "out": str(folder / "trl")}
    spec |= {"rows": str(folder / f"{kind}.theirs.jsonl"), "threads": torch.get_num_threads(), "steps": steps}
    spec |= {"lr": LR[kind], "beta": BETA[kind], "pairs": pairs, "group": GROUP, "tokens": TOKENS, "pattern": PATTERN}
    return run([python, PEERS / "trl_align.py", json.dumps(spec | how)])


def figures(told, kind, pairs):
    """What is compared: pairs or steps per second, bytes."""
    timed = told["seconds"][1:] or told["seconds"]
    rate = (pairs if kind == "dpo" else 1) * len(timed) / sum(timed)
    return {**told, "rate": rate, "more": told["peak"] - told["imported"]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step; TRL's own is 8")
    parser.add_argument("--only", choices=("dpo", "grpo"))
    parser.add_argument("--without", default="", help="contenders to leave out: names with semicolons")
    parser.add_argument("--quick", action="store_true", help="one round of two pairs a step")
    parser.add_argument("--peer-python", default="")
    options = parser.parse_args()
    python = peer_python(options.peer_python)
    rounds, count = (1, 2) if options.quick else (options.rounds, options.pairs)
    tokenizer = AutoTokenizer.from_pretrained(resolve(ModelRef(name=MODEL)).folder)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for kind in (options.only,) if options.only else ("dpo", "grpo"):
            if kind == "dpo":
                write(folder, kind, pairs(options.data / "hh-rlhf/harmless-base-test.jsonl.gz", tokenizer, 8 * 4))
            else:
                write(folder, kind, questions(options.data / "gsm8k/train.jsonl", tokenizer, 16))
            results = {}
            for number in range(rounds):
                for name, how in CONTENDERS[kind].items():
                    if name in options.without.split(";"):
                        continue
                    asked = folder, kind, options.steps, count, how
                    told = ours(*asked) if name.startswith("llmkit") else theirs(python, *asked)
                    results.setdefault(name, []).append(figures(told, kind, count))
                    last = results[name][-1]
                    print(
                        f"{kind} {number + 1}: {name:40} {last['rate']:.4f} a second, {last['peak'] / 2**30:.2f} GiB "
                        f"({last['more'] / 2**30:.2f}), {[round(s, 1) for s in last['seconds']]} s, "
                        f"{last['losses']}, {last['tokens']}",
                        flush=True,
                    )
            tell(kind, results)


def tell(kind, results):
    """The table of medians, and the ratios that are asked for."""
    what = "pairs/s" if kind == "dpo" else "seconds a step"
    print(f"\n| {kind} | {what} | peak GiB | less what imports take |\n|---|---|---|---|")
    for name, runs in results.items():
        rate, peak, more = (statistics.median(r[key] for r in runs) for key in ("rate", "peak", "more"))
        shown = f"{rate:.3f}" if kind == "dpo" else f"{1 / rate:.2f}"
        print(f"| {name} | {shown} | {peak / 2**30:.2f} | {more / 2**30:.2f} |")
    print()
    for mine in (name for name in results if name.startswith("llmkit")):
        for other in (name for name in results if name.startswith("TRL")):
            if ("precomputed" in mine) == ("precomputed" in other):
                print(f"{mine} / {other}: " + ", ".join(compared(results[mine], results[other])))
    if kind == "dpo":
        first = {name: runs[0]["losses"] for name, runs in results.items()}
        mine = first["llmkit"]
        gaps = {n: max(abs(a - b) for a, b in zip(mine, ls, strict=True)) for n, ls in first.items()}
        print("largest difference of the losses from llmkit's, step by step:")
        print(", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()))


def compared(ours, theirs):
    """Ratios of one pair of contenders: the median of the rounds', the least and the most."""
    for key, name in (("rate", "speed"), ("peak", "peak"), ("more", "peak less imports")):
        ratios = [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]
        yield f"{name} {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
