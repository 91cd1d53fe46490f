"""How fast and how large is alignment on one GPU, beside TRL?

    python benchmarks/align_gpu.py [--to FILE] [--rounds 3] [--budget 280] [--only dpo,grpo] [--small]

One process has both libraries. The model has the shape of SmolLM2-135M and random weights in bf16, LoRA of rank 16 on
all linears in fp32, autocast to bf16: so both run there by themselves. DPO: pairs of ragged prompts and answers, about
350 + 115 tokens, 16 of a step; GRPO: 8 prompts of about 100 tokens a step, 8 answers of 64 tokens to each, a price on
divergence, a pattern as the reward; TRL draws them by `generate`. Each round runs every contender once, of which the
first steps are left out (they compile, and fill the allocator); figures are medians of the rounds' medians. Peaks are
what torch allocated; of ours the foretold one beside it. A step of DPO is profiled: `busy` is the share of it in which
a kernel ran. Each run is written to FILE when it ends; what does not fit into the budget (seconds) is left out, and
said. `--small` is a try on any machine.
"""

import argparse
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from gpu import DEVICE, Profile, attempt, clock, made, peak
from transformers import TrainerCallback

from llmkit import Preference, run
from llmkit.core.console import Console
from llmkit.stages import build_training
from llmkit.stages.holding import BASE
from llmkit.stages.planned import planned
from llmkit.stages.policy import Policy

SIZES = {
    "135m": {"pairs": 16, "prompts": 8, "group": 8, "tokens": 64, "prompt": 350, "answer": 115, "asked": 100},
    "small": {"pairs": 2, "prompts": 2, "group": 2, "tokens": 4, "prompt": 24, "answer": 8, "asked": 8},
}
STEPS = {"dpo": 12, "grpo": 4}
STEADY = {"dpo": slice(3, 10), "grpo": slice(1, 4)}
"""The steps that count: before they compile, and those after are profiled."""
LR, BETA, PATTERN = 1e-5, {"dpo": 0.1, "grpo": 0.04}, "w"
CONTENDERS = {
    "llmkit": {"share_prompts": True},
    "llmkit, prompts not shared": {"share_prompts": False},
    "TRL recompute (its default)": {"gradient_checkpointing": True},
    "TRL": {"gradient_checkpointing": False},
}


def ragged(draw, mean):
    """Words, from a half of so many to one and a half of it."""
    return " ".join(f"w{draw.randrange(400)}" for _ in range(draw.randint(mean // 2, mean + mean // 2)))


def rows(kind, size):
    """As many as all steps take once."""
    draw, made = random.Random(0), []
    for _ in range(STEPS[kind] * size["pairs" if kind == "dpo" else "prompts"]):
        if kind == "dpo":
            chosen, rejected = (" " + ragged(draw, size["answer"]) for _ in range(2))
            made.append({"prompt": ragged(draw, size["prompt"]), "chosen": chosen, "rejected": rejected})
        else:
            made.append({"prompt": ragged(draw, size["asked"])})
    return made


def node(kind, folder, held, size, at, how):
    """The stage of ours."""
    source = at / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in held))
    given = {
        "model": str(folder),
        "adapter": {"kind": "lora", "rank": 16, "alpha": 32},
        "data": {"train": [{"kind": "jsonl", "path": str(source)}], "max_length": 1024, "lint": "off"},
        "precision": "bf16_mixed",
        "optim": {"kind": "adamw", "lr": LR, "weight_decay": 0.0},
        "schedule": {"kind": "constant"},
        "steps": STEPS[kind],
        "checkpoint": {"every": 10**6},
        "out": str(at / "run"),
        **how,
    }
    if kind == "dpo":
        return Preference(**given, loss={"kind": "dpo", "beta": BETA[kind]}, batch={"pairs": size["pairs"]})
    given["data"]["max_length"] = 2 * size["asked"] + size["tokens"]
    given |= {"rollout": {"group": size["group"], "max_tokens": size["tokens"]}, "batch": {"prompts": size["prompts"]}}
    return Policy(**given, loss={"kind": "grpo", "beta": BETA[kind]}, reward=[{"kind": "regex", "pattern": PATTERN}])


def ours(kind, folder, held, size, at, how):
    """One run of llmkit."""
    stage = node(kind, folder, held, size, at, how)
    free = torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else 8 << 30
    account = planned(stage, DEVICE, 1, free).choice.account
    watch = Profile(STEPS[kind] - 2 if kind == "dpo" else STEPS[kind])  # of rollouts it would hold too much
    with watch.over(build_training, "_entered"):
        artifact = run(stage, console=Console(quiet=True))
    lines = [json.loads(text) for text in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] == "train"]
    return {
        "seconds": [line["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "lengths": [line.get("length", 0) for line in lines],
        "peak": max(line["peak_memory_bytes"] for line in lines) if DEVICE == "cuda" else 0,
        "foretold": max(account.load, account.total) - BASE[DEVICE],
        **watch.told(),
    }


class Clock(TrainerCallback):
    """When steps end: what is between two of them (rollouts are) belongs to the second."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, *_, **__):
        self.ends.append(clock())

    def on_step_end(self, *_, **__):
        self.ends.append(clock())


def theirs(kind, folder, held, size, at, how):
    """One run of TRL."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    common = {
        "output_dir": str(at / "trl"),
        "use_cpu": DEVICE == "cpu",
        "bf16": True,
        "max_steps": STEPS[kind],
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "beta": BETA[kind],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": size["pairs"] if kind == "dpo" else size["prompts"] * size["group"],
        **how,
    }
    lengths = []

    def matched(completions, completion_ids, **_):
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
        return [float(re.search(PATTERN, text) is not None) for text in completions]

    given = {"model": get_peft_model(model, lora), "train_dataset": Dataset.from_list(held)}
    given |= {"processing_class": tokenizer}
    if kind == "dpo":
        trainer = DPOTrainer(args=DPOConfig(**common), **given)
    else:
        more = {"num_generations": size["group"], "max_completion_length": size["tokens"]}
        trainer = GRPOTrainer(args=GRPOConfig(**common, **more), reward_funcs=matched, **given)
    timed = Clock()
    trainer.add_callback(timed)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    seconds = [b - a for a, b in pairwise(timed.ends)]
    return {"seconds": seconds, "losses": losses, "lengths": lengths, "peak": peak()}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--to", type=Path, default=Path("align_gpu.json"))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--budget", type=float, default=280.0)
    options.add_argument("--only", default="dpo,grpo")
    options.add_argument("--small", action="store_true")
    said = options.parse_args()
    began, found, shape = time.perf_counter(), {}, "small" if said.small else "135m"
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as top:
        folder = made(shape, Path(top) / shape)
        for number, kind in [(number, kind) for number in range(said.rounds) for kind in said.only.split(",")]:
            held = rows(kind, SIZES[shape])
            for who, how in CONTENDERS.items():
                key, work = f"{kind} {number + 1}: {who}", ours if who.startswith("llmkit") else theirs
                if time.perf_counter() - began > said.budget:
                    print(f"{key}: left out, over the budget", flush=True)
                    continue
                with tempfile.TemporaryDirectory() as at:
                    given = (kind, folder, held, SIZES[shape], Path(at), how)
                    told = attempt(kind, who, lambda work=work, given=given: work(*given))
                found.setdefault(kind, {}).setdefault(who, []).append(told)
                said.to.write_text(json.dumps({"device": name, "torch": torch.__version__, "found": found}))
                if text := told.pop("profile", ""):
                    said.to.with_name(f"{said.to.stem}-{kind}-{len(who)}.txt").write_text(text)
                print(key, {k: v for k, v in told.items() if k not in ("lengths", "losses")}, flush=True)
    print(f"{name}, torch {torch.__version__}")
    for kind, held in found.items():
        print("\n".join(table(kind, held, SIZES[shape])))


def table(kind, held, size):
    """Medians, and the ratios of the rounds with the least and the most."""
    each = size["pairs"] if kind == "dpo" else 1
    speeds = {
        who: [statistics.median(one["seconds"][STEADY[kind]]) for one in runs if "seconds" in one]
        for who, runs in held.items()
    }
    for who, seconds in speeds.items():
        if not seconds:
            yield f"{kind} {who}: {held[who][0].get('failed')}"
            continue
        middle, most = statistics.median(seconds), max(one["peak"] for one in held[who] if "peak" in one) / 2**30
        foretold = max(one.get("foretold", 0) for one in held[who]) / 2**30
        rate = f"{each / middle:.1f} pairs/s" if kind == "dpo" else f"{middle:.2f} s a step"
        yield f"{kind} | {who} | {rate} | {most:.2f} GiB ({foretold:.2f} foretold) | {len(seconds)} rounds"
    mine = speeds.get("llmkit", [])
    for who, runs in held.items():
        if one := next((run["profiled"] for run in runs if "profiled" in run), None):
            told = f"a step {one['wall_ms']:.1f} ms profiled, {one['kernels']} kernels, busy {one['busy']:.0%}"
            yield f"{kind} {who}: {told}"
    for who, seconds in speeds.items():
        if ratios := [b / a for a, b in zip(mine, seconds, strict=False)]:
            yield f"{kind} llmkit / {who}: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
