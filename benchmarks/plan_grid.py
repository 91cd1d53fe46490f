"""Does `llmkit plan` say how much memory a run needs?

    python benchmarks/plan_grid.py [--only TEXT] [--out FILE] [--seen FILE] [--model NAME]

Runs each recipe of the grid (method x adapter x packing x recompute x length x strategy) for two steps, a process of
its own each (of several ranks: one each), and compares its peak with the prediction. On a CPU the peak is that of the
resident memory less what was resident after the imports; of several ranks the largest. `--out` writes the table and
what was measured; `--seen` takes what an earlier call measured, so that formulas can be judged again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

HEAVY = ("peft", "transformers.trainer_pt_utils")
HEAVY += ("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3")
"""What a run imports, and what is resident of it, is no part of its peak."""
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "vocab_size": 16384, "max_position_embeddings": 4096, "tie_word_embeddings": True}
WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}
WIDE |= {"num_key_value_heads": 6, "vocab_size": 32768, "max_position_embeddings": 4096, "tie_word_embeddings": False}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {"small": ("LlamaConfig", SMALL), "wide": ("Qwen3Config", WIDE | {"head_dim": 64})}

LORA, DROPOUT = {"kind": "lora", "rank": 16}, {"kind": "lora", "rank": 16, "dropout": 0.1}
DORA, IA3, VERA = {"kind": "lora", "rank": 16, "dora": True}, {"kind": "ia3"}, {"kind": "vera", "rank": 64}
BOTTLENECK, PREFIX = {"kind": "bottleneck", "size": 32}, {"kind": "prefix_tuning", "virtual_tokens": 16}
FULL = {"kind": "none"}
METHODS = {
    "full": {"adapter": FULL},
    "full sgd": {"adapter": FULL, "optim": {"kind": "sgd", "lr": 1e-3}},
    "full adafactor": {"adapter": FULL, "optim": {"kind": "adafactor", "lr": 1e-3}},
    "full 8bit": {"adapter": FULL, "optim": {"kind": "adamw_8bit", "lr": 1e-5}},
    "full bf16": {"adapter": FULL, "precision": "bf16"},
    "full bf16_mixed": {"adapter": FULL, "precision": "bf16_mixed"},
    "lora": {"adapter": LORA},
    "lora dropout": {"adapter": DROPOUT},
    "lora bf16": {"adapter": LORA, "precision": "bf16"},
    "lora bf16_mixed": {"adapter": LORA, "precision": "bf16_mixed"},
    "dora": {"adapter": DORA},
    "ia3": {"adapter": IA3},
    "vera": {"adapter": VERA},
    "bottleneck": {"adapter": BOTTLENECK},
    "prefix": {"adapter": PREFIX},
    "qlora": {"adapter": LORA, "quant": {"kind": "bnb_nf4"}},
    "int8 lora": {"adapter": LORA, "quant": {"kind": "bnb_int8"}},
    "dpo": {"kind": "preference", "adapter": LORA},
    "dpo full": {"kind": "preference", "adapter": FULL, "reference": "model"},
    "reward": {"kind": "reward", "adapter": LORA},
    "distill": {"kind": "distill", "adapter": LORA, "teacher": "wide"},
    "grpo": {"kind": "policy", "adapter": LORA},
    "grpo full": {"kind": "policy", "adapter": FULL, "reference": "model"},
    "grpo scored": {"kind": "policy", "adapter": LORA, "reward": [{"kind": "model", "path": "scores"}]},
}
GRID = [
    # model, method, packing, recompute, length, rows a forward, micro-batches a step, ranks, strategy
    *[("small", "full", "first_fit", again, 512, 2, 1, 1, "single") for again in ("none", "selective", "full")],
    *[
        ("small", "full", "first_fit", "none", length, rows, 2, 1, "single")
        for length, rows in ((512, 1), (1024, 1), (512, 4))
    ],
    ("small", "full", "none", "none", 512, 4, 1, 1, "single"),
    ("wide", "full", "first_fit", "none", 512, 1, 2, 1, "single"),
    ("wide", "full", "first_fit", "full", 1024, 1, 1, 1, "single"),
    *[("wide", f"full {how}", "first_fit", "none", 512, 2, 1, 1, "single") for how in ("sgd", "adafactor", "8bit")],
    *[("wide", f"full {how}", "first_fit", "none", 512, 2, 1, 1, "single") for how in ("bf16", "bf16_mixed")],
    *[("small", "lora", "first_fit", again, 1024, 2, 1, 1, "single") for again in ("none", "selective", "full")],
    ("small", "lora", "none", "none", 512, 4, 2, 1, "single"),
    ("wide", "lora", "first_fit", "none", 1024, 1, 2, 1, "single"),
    ("wide", "lora", "first_fit", "full", 2048, 1, 1, 1, "single"),
    *[("small", f"lora {how}", "first_fit", "none", 1024, 2, 1, 1, "single") for how in ("dropout", "bf16")],
    ("small", "lora bf16_mixed", "first_fit", "none", 1024, 2, 1, 1, "single"),
    *[("small", how, "first_fit", "none", 1024, 2, 1, 1, "single") for how in ("dora", "ia3", "vera", "bottleneck")],
    ("small", "prefix", "none", "none", 512, 4, 1, 1, "single"),
    *[("wide", "qlora", "first_fit", again, 512, 2, 1, 1, "single") for again in ("none", "full")],
    ("wide", "int8 lora", "first_fit", "none", 512, 2, 1, 1, "single"),
    *[("small", "full", "first_fit", again, 512, 2, 1, 2, "ddp") for again in ("none", "full")],
    ("wide", "full", "first_fit", "none", 512, 1, 2, 2, "ddp"),
    ("small", "lora", "first_fit", "none", 1024, 2, 1, 2, "ddp"),
    ("small", "lora", "none", "none", 512, 4, 2, 2, "ddp"),
    *[("small", "full", "first_fit", again, 512, 2, 1, 2, "fsdp") for again in ("none", "full")],
    ("wide", "full", "first_fit", "none", 512, 1, 2, 2, "fsdp"),
    ("wide", "full", "first_fit", "selective", 1024, 1, 1, 2, "fsdp"),
    ("small", "lora", "first_fit", "none", 1024, 2, 1, 2, "fsdp"),
    ("wide", "lora", "first_fit", "full", 1024, 1, 2, 2, "fsdp"),
    ("wide", "qlora", "first_fit", "full", 512, 1, 1, 2, "fsdp"),
    *[("wide", how, "first_fit", "none", 512, 1, 1, 1, "single") for how in ("dpo", "dpo full", "reward")],
    ("small", "distill", "first_fit", "none", 512, 2, 1, 1, "single"),
    *[("wide", how, "first_fit", "none", 256, 1, 2, 1, "single") for how in ("grpo", "grpo full", "grpo scored")],
    ("small", "grpo", "first_fit", "none", 512, 1, 1, 1, "single"),
    ("small", "grpo", "first_fit", "none", 256, 1, 1, 2, "ddp"),
]
NAMES = ("model", "method", "packing", "recompute", "length", "rows", "turns", "ranks", "strategy")


def title(row):
    return " ".join(map(str, row))


def recipe(row, work):
    """The stage of a row, whose packed rows are full."""
    said = dict(zip(NAMES, row, strict=True))
    more = {"optim": {"kind": "adamw", "lr": 1e-5}} | METHODS[said["method"]]
    kind = more.setdefault("kind", "sft")
    if kind == "policy":
        more |= {"rollout": {"group": 4, "max_tokens": said["length"] - 32}, "loss": {"kind": "grpo", "beta": 0.1}}
        more["reward"] = more.get("reward", [{"kind": "length", "shape": {"kind": "at_most", "length": 8}}])
        more["reward"] = [one | ({"path": str(work / one["path"])} if "path" in one else {}) for one in more["reward"]]
    if "teacher" in more:
        more["teacher"] = str(work / more["teacher"])
    counts = {"preference": "pairs", "reward": "pairs", "policy": "prompts"}.get(kind, "rows")
    rows = f"{said['length']}{'.pairs' if counts != 'rows' else ''}.jsonl"
    return {
        "model": str(work / said["model"]),
        "data": {
            "train": [{"kind": "jsonl", "path": str(work / rows)}],
            "max_length": said["length"],
            "packing": said["packing"],
            **({"overflow": "truncate"} if kind != "policy" else {}),
        },
        "batch": {counts: said["rows"] * said["turns"] * said["ranks"]},
        "micro_batch": said["rows"],
        "memory": {"recompute": said["recompute"]},
        "parallel": {"strategy": said["strategy"]},
        "steps": 2,
        "schedule": {"kind": "constant"},
        "guard": {"spike": 0.0},
        "out": str(work / f"run-{abs(hash(row))}"),
        **more,
    }


def stage(said):
    """The node of a recipe."""
    return getattr(import_module(f"llmkit.stages.{said['kind']}"), said["kind"].title())(**said)


def prepare(work):
    """The models and the rows, once for all."""
    import torch
    import transformers

    from tests.conftest import make_tokenizer

    for name, (kind, sizes) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**(sizes | ENDS))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(work / name)
        make_tokenizer().save_pretrained(work / name)
    torch.manual_seed(0)
    scores = transformers.LlamaConfig(**(MODELS["small"][1] | ENDS | {"num_labels": 1}))
    transformers.AutoModelForSequenceClassification.from_config(scores).save_pretrained(work / "scores")
    make_tokenizer().save_pretrained(work / "scores")
    for length in (256, 512, 1024, 2048):
        words = "the quick brown fox jumps over the lazy dog " * (length // 4)  # longer than a row: cut to it
        said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": words}]
        (work / f"{length}.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 64)
        pair = {"prompt": said[:1], "chosen": said[1:], "rejected": [said[1] | {"content": words[4:]}]}
        (work / f"{length}.pairs.jsonl").write_text((json.dumps(pair) + "\n") * 64)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def one(text):
    """In a process of its own: imports, measures, runs, and says how far memory went up."""
    for name in HEAVY:
        import_module(name)

    from llmkit import run
    from llmkit.core.console import Console
    from llmkit.core.memory import peak

    node = stage(json.loads(text))
    before = resident()
    run(node, console=Console(quiet=True, mute=True))
    print(json.dumps({"peak": peak("cpu") - before}))


def measure(row, work):
    """Bytes: the peak of a row's run, of several ranks the largest."""
    from llmkit.core.ranks import Ranks, free_port

    told, ranks, port = json.dumps(recipe(row, work)), row[NAMES.index("ranks")], free_port()
    made = []
    for rank in range(ranks):
        env = dict(os.environ)
        if ranks > 1:
            env |= Ranks(rank, ranks, rank, ranks).environment(port)
        made.append(
            subprocess.Popen(
                [sys.executable, __file__, "--one", told], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
            )
        )
    ends = [process.communicate() for process in made]
    if any(process.returncode for process in made):
        return None, b"".join(end[1] for end in ends).decode().strip().splitlines()[-1:]
    return max(json.loads(end[0].decode().splitlines()[-1])["peak"] for end in ends), ""


def predict(row, work):
    """Bytes that `llmkit plan` says of a row, by peak; nothing is resumed here."""
    from llmkit.stages.planned import planned

    peaks = planned(stage(recipe(row, work)), "cpu", row[NAMES.index("ranks")], 1 << 40).peaks
    return {name: size for name, size in peaks.items() if name != "resume"}


def table(found, work):
    """The lines of the table, and the errors."""
    lines, errors = ["| " + " | ".join((*NAMES, "predicted", "measured", "error")) + " |", "|---" * 12 + "|"], []
    for row, seen in found:
        told = predict(row, work)
        whole = max(told.values())
        errors.append(whole / seen - 1)
        figures = (f"{whole / 2**20:.0f}", f"{seen / 2**20:.0f}", f"{errors[-1]:+.1%}")
        lines.append("| " + " | ".join(map(str, (*row, *figures))) + " |")
    sizes = sorted(map(abs, errors))
    within = sum(size <= 0.1 for size in sizes)
    lines += ["", f"{within} of {len(sizes)} within 10 %, the median {statistics.median(sizes):.1%}, "]
    lines[-1] += f"the largest {sizes[-1]:.1%}. MiB."
    return lines, errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="Rows whose title holds this.")
    parser.add_argument("--out", type=Path, help="Where the table (.md) and what was measured (.json) go.")
    parser.add_argument("--seen", type=Path, help="What was measured before.")
    args = parser.parse_args()
    if args.one:
        one(args.one)
        return
    known = json.loads(args.seen.read_text()) if args.seen else {}
    rows = [row for row in GRID if args.only in title(row)]
    with tempfile.TemporaryDirectory() as folder:
        work, found, begun = Path(folder), [], time.monotonic()
        prepare(work)
        for row in rows:
            if title(row) not in known and args.seen is None:
                known[title(row)], why = measure(row, work)
                print(f"{title(row)}: {(known[title(row)] or 0) / 2**20:.0f} MiB {''.join(why)}", flush=True)
            if known.get(title(row)):
                found.append((row, known[title(row)]))
        lines, _ = table(found, work)
        print("\n".join(lines))
        print(f"{time.monotonic() - begun:.0f} s")
        if args.out:
            args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
            args.out.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
