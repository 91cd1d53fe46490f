"""How fast is supervised fine-tuning, beside TRL in its own environment?

    python benchmarks/train_sft.py --data FOLDER [--rounds 5] [--steps 6] [--full]

FOLDER holds gsm8k/train.jsonl. Each round runs every contender once, in turn; the figures are medians over rounds of
tokens per second (padding excluded, the first step left out) and of the peak resident memory of the process. The limit
is what the rate of fp32 matrix products, measured in the same round, would allow for the products of a step alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from llmkit.data.order import permutation
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve

MODEL = "smollm2-135m-instruct-q4"
TRL = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "peft==0.21.2")
ROWS, LR = 192, 2e-4
OURS = """
kind: sft
model: {model}
adapter: {adapter}
data:
  train: [{{kind: jsonl, path: {rows}, columns: {{prompt: question, completion: answer}}}}]
  max_length: 512
batch: {{rows: 4}}
steps: {steps}
precision: {precision}
optim: {{kind: adamw, lr: {lr}}}
schedule: {{kind: constant}}
out: {out}
"""


def peer_python(given):
    """The interpreter of the peer's environment, made at first use."""
    if given:
        return given
    folder = Path(__file__).parent / ".envs" / "trl"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *TRL], check=True)
    return str(python)


def rows(source, folder):
    """192 rows for us, and the same in the order in which our seed 0 takes them for TRL."""
    lines = [line for line in source.read_text().splitlines() if len(line) < 1200][:ROWS]
    (folder / "ours.jsonl").write_text("\n".join(lines) + "\n")
    order = permutation(0, 0, len(lines))
    (folder / "theirs.jsonl").write_text("\n".join(lines[i] for i in order) + "\n")


def matrix_rate(threads):
    """fp32 products of the model's commonest shape, GFLOP/s."""
    code = (
        f"import torch, time; torch.set_num_threads({threads}); a, b = torch.randn(1024, 576), torch.randn(1536, 576)\n"
        "f = lambda: torch.nn.functional.linear(a, b)\n[f() for _ in range(5)]; t = time.monotonic()\n"
        "[f() for _ in range(100)]; print(2 * 1024 * 576 * 1536 * 100 / (time.monotonic() - t) / 1e9)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def ours(folder, name, steps, lora, precision, threads):
    """One run of `llmkit run`."""
    out = folder / name
    recipe = folder / f"{name}.yaml"
    adapter = "{kind: lora, rank: 16, alpha: 32}" if lora else "none"
    recipe.write_text(
        OURS.format(
            model=MODEL, adapter=adapter, rows=folder / "ours.jsonl", steps=steps, precision=precision, lr=LR, out=out
        )
    )
    subprocess.run([sys.executable, "-m", "llmkit", "run", recipe], check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] == "train"]
    return {
        "tokens_per_second": sum(s["tokens"] for s in lines[1:]) / sum(s["seconds"] for s in lines[1:]),
        "peak_gib": lines[-1]["peak_memory_bytes"] / 2**30,
        "losses": [line["loss"] for line in lines],
        "supervised": sum(s["supervised_tokens"] for s in lines) / sum(s["tokens"] for s in lines),
    }


def theirs(python, folder, steps, lora, threads, packing, recompute, bf16=False):
    """One run of TRL."""
    spec = {
        "model": str(resolve(ModelRef(name=MODEL)).folder),
        "rows": str(folder / "theirs.jsonl"),
        "out": str(folder / "trl"),
    }
    spec |= {
        "threads": threads,
        "lora": lora,
        "packing": packing,
        "recompute": recompute,
        "bf16": bf16,
        "steps": steps,
        "lr": LR,
    }
    script = Path(__file__).parent / "peers" / "trl_sft.py"
    done = subprocess.run([python, script, json.dumps(spec)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def contenders(lora, bf16):
    """Name -> how it runs."""
    made = {"llmkit fp32": ("ours", "fp32")}
    for recompute in (True, False):
        for packing in (False, True):
            name = f"TRL fp32{' recompute' if recompute else ''}{' packed' if packing else ' padded'}"
            made[name] = ("theirs", packing, recompute, False)
    if bf16:
        made["llmkit bf16_mixed"] = ("ours", "bf16_mixed")
        made["TRL bf16 recompute padded"] = ("theirs", False, True, True)  # what it does when it is told nothing
        made["TRL bf16 packed"] = ("theirs", True, False, True)
        made["TRL bf16 padded"] = ("theirs", False, False, True)
    return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--full", action="store_true", help="train every weight instead of a LoRA")
    parser.add_argument("--bf16", action="store_true", help="also compare under bf16")
    parser.add_argument("--without", default="", help="contenders to leave out: names with commas")
    parser.add_argument("--peer-python", default="")
    options = parser.parse_args()
    python, threads, lora = peer_python(options.peer_python), torch.get_num_threads(), not options.full
    chosen = {n: how for n, how in contenders(lora, options.bf16).items() if n not in options.without.split(",")}
    results, rates = {}, []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows(options.data / "gsm8k" / "train.jsonl", folder)
        for number in range(options.rounds):
            rates.append(matrix_rate(threads))
            for name, how in chosen.items():
                if how[0] == "ours":
                    run = ours(folder, f"ours-{number}-{how[1]}", options.steps, lora, how[1], threads)
                else:
                    run = theirs(python, folder, options.steps, lora, threads, *how[1:])
                results.setdefault(name, []).append(run)
                print(
                    f"round {number + 1}: {name:30} {run['tokens_per_second']:.0f} tokens/s, {run['peak_gib']:.2f} GiB",
                    flush=True,
                )
    tell(results, rates, lora)


def tell(results, rates, lora):
    """The table of medians, and the ratios that are asked for."""
    middle = {
        name: (statistics.median(r["tokens_per_second"] for r in runs), statistics.median(r["peak_gib"] for r in runs))
        for name, runs in results.items()
    }
    print("\n| | tokens/s | peak GiB |\n|---|---|---|")
    for name, (speed, peak) in middle.items():
        print(f"| {name} | {speed:.0f} | {peak:.2f} |")
    for kind, ours in (("fp32", "llmkit fp32"), ("bf16", "llmkit bf16_mixed")):
        peers = {name: value for name, value in middle.items() if name.startswith(f"TRL {kind}")}
        if peers:
            default, best = f"TRL {kind} recompute padded", max(peers, key=lambda name: peers[name][0])
            print()
            for name in (name for name in (default, best) if name in peers):
                speed, peak = (a / b for a, b in zip(middle[ours], middle[name], strict=True))
                print(f"{ours} / {name}: speed {speed:.2f} x, memory {peak:.2f} x")
    mine = middle["llmkit fp32"]
    share = statistics.median(r["supervised"] for r in results["llmkit fp32"])
    body, head = 106.2e6, 28.3e6
    flops = (4 if lora else 6) * (body + head * share)
    rate = statistics.median(rates)
    limit = rate * 1e9 / flops
    print(f"matrix products: {rate:.0f} GFLOP/s, limit {limit:.0f} tokens/s, reached {mine[0] / limit:.0%}")
    pairs = zip(results["llmkit fp32"][0]["losses"], results["TRL fp32 recompute padded"][0]["losses"], strict=True)
    print(f"largest difference of the losses, step by step: {max(abs(a - b) for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
