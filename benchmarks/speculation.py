"""What speculation gains on Spec-Bench, by category and batch, beside none and beside transformers' own.

    python benchmarks/speculation.py --data FOLDER [--batch 1 4 8] [--count 8] [--tokens 128]
        [--drafter NAME='{"kind": "head", "path": "runs/head/model"}' ...] [--assistant FOLDER] [--only NAME ...]

FOLDER holds spec-bench/question.jsonl. Every contender is started once, in a process of its own, and stands still
(SIGSTOP) while another has its turn. Of each category `count` first turns are asked, `batch` at a time, and each such
group is asked of every contender one after another, the one that begins moving on from group to group: times are
compared in pairs. Greedy, fp32, prompts new to every cache; times are whole, prompts included.

Of each category, batch and contender: tokens a step of a sequence (the one that is not drafted included), the share of
drafts that were right, and the speed-up over none with the 95 % interval of its bootstrap over groups. Of transformers
(batch 1) the speed-up is over transformers' own generate. Texts of ours that differ from those without drafts are
counted: there are to be none.
"""

import argparse
import json
import random
import signal
import sys
from collections import defaultdict
from pathlib import Path

from contender import Contender

from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.stats.bootstrap import ratio

MODEL = "smollm2-135m-instruct-q4"
TURNS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""The categories of MT-bench, which Spec-Bench has as one."""
OURS, THEIRS = "none", "transformers"


def questions(args, llm_prompt):
    """Category -> prompts in tokens, in an order of chance."""
    found = defaultdict(list)
    for line in (args.data / "spec-bench" / "question.jsonl").read_text().splitlines():
        row = json.loads(line)
        name = "multi-turn" if row["category"] in TURNS else row["category"]
        found[name].append(llm_prompt(row["turns"][0]))
    for name, rows in found.items():
        random.Random(name).shuffle(rows)
        found[name] = rows[: args.count]
    return {name: rows for name, rows in found.items() if not args.category or name in args.category}


def contenders(args):
    """Name -> script and what it is told."""
    ours = {OURS: None, "ngram": {"kind": "ngram"}}
    ours |= {name: json.loads(node) for name, node in (one.split("=", 1) for one in args.drafter)}
    made = {name: ("speculation_llmkit.py", {"speculation": node}) for name, node in ours.items()}
    theirs = {THEIRS: {}, "transformers lookup": {"lookup": 10}}
    if args.assistant:
        theirs["transformers assisted"] = {"assistant": args.assistant}
    if not args.alone:
        made |= {name: ("speculation_hf.py", more) for name, more in theirs.items()}
    return {name: how for name, how in made.items() if not args.only or name in args.only}


def groups(rows, size):
    """So many prompts at a time."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def measured(args, asked):
    """(category, batch, contender) -> what it said of each group."""
    folder = str(resolve(ModelRef(name=MODEL)).folder)
    spec = {"folder": folder, "model": MODEL, "threads": args.threads}
    spec |= {"tokens": args.tokens, "temperature": args.temperature, "seed": 0}
    running, told = {}, defaultdict(list)
    try:
        for name, (script, more) in contenders(args).items():
            running[name] = Contender(sys.executable, script, spec | more, {})
        for batch in args.batch:
            able = [name for name in running if batch == 1 or not name.startswith(THEIRS)]
            for category, rows in asked.items():
                for turn, group in enumerate(groups(rows, batch)):
                    for name in able[turn % len(able) :] + able[: turn % len(able)]:
                        told[category, batch, name].append(running[name].round({"prompts": group}))
                for name in able:
                    print(json.dumps(line(told, category, batch, name)), flush=True)
    finally:
        for contender in running.values():
            contender.end()
    return told


def line(told, category, batch, name):
    """The figures of one contender."""
    mine, base = told[category, batch, name], told[category, batch, THEIRS if name.startswith(THEIRS) else OURS]
    whole = {key: sum(one[key] for one in mine) for key in ("made", "drafted", "accepted", "seconds")}
    made = {"category": category, "batch": batch, "drafter": name}
    made["tokens_per_second"] = round(whole["made"] / whole["seconds"], 1)
    made["tokens_a_step"] = round(whole["made"] / max(1, whole["made"] - whole["accepted"]), 2)
    if whole["drafted"]:
        made["right"] = round(whole["accepted"] / whole["drafted"], 3)
    if base:
        # a token more or less, where texts of transformers part, is no gain: what is compared is the time of a token
        tokens = [one["made"] for one in base]
        apart = [[one["seconds"] / one["made"] for one in each] for each in (base, mine)]
        found = ratio("speed-up", *([a * b for a, b in zip(each, tokens, strict=True)] for each in apart))
        made["speed_up"] = round(found.value, 3)
        if len(mine) > 1:
            made |= {"low": round(found.low, 3), "high": round(found.high, 3)}
        texts = [[ids for one in each for ids in one["ids"]] for each in (base, mine)]
        made["other_texts"] = sum(a != b for a, b in zip(*texts, strict=True))
    return made


def main():
    from transformers import AutoTokenizer

    from llmkit.data.prompt import prompt_ids
    from llmkit.data.render import Renderer

    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--count", type=int, default=8, help="prompts of a category")
    parser.add_argument("--category", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drafter", nargs="*", default=[], help="NAME=NODE in json")
    parser.add_argument("--assistant", default="", help="a folder, for transformers")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--only", nargs="*", default=[], help="names of contenders")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # contenders that stand still are not left behind
    renderer = Renderer(AutoTokenizer.from_pretrained(resolve(ModelRef(name=MODEL)).folder))
    asked = questions(args, lambda said: prompt_ids(renderer, [{"role": "user", "content": said}]))
    told = measured(args, asked)
    print("| category | batch | drafter | tokens/s | tokens a step | speed-up |\n|---|---|---|---|---|---|")
    for key in told:
        row = line(told, *key)
        gain = f"{row['speed_up']:.2f}" if "speed_up" in row else ""
        gain += f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
        print(f"| {key[0]} | {key[1]} | {key[2]} | {row['tokens_per_second']} | {row['tokens_a_step']} | {gain} |")


if __name__ == "__main__":
    main()
