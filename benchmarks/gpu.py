"""How fast does one GPU train and answer with llmkit, beside transformers with a plain loop of torch?

    python benchmarks/gpu.py [--to FILE] [--shapes 135m,1b] [--budget 150] [--small]

Models have the shapes of SmolLM2-135M and of Llama-3.2-1B and random weights, rows are ragged (64 to 2,000 tokens).
Training: bf16_mixed, LoRA (rank 16, all linears) and full, AdamW; tokens that are no padding, per second, the median
of the steps after the first four. The plain loop pads the same rows to the longest of each micro-batch. Peaks are what
torch allocated; of ours the foretold one beside it. Decoding: bf16, greedy, prompts of 128 tokens, 128 made, tokens
made per second with the prompts' reading. `--small` is a try on any machine. What does not fit into the budget
(seconds) is left out, and said.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from llmkit import Sft, run
from llmkit.build.llm import LLM
from llmkit.core.console import Console
from llmkit.inference.sampling import Sampling
from llmkit.stages.planned import planned
from llmkit.stages.sizes import BASE

SHAPES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
}
WARM, STEPS, ROWS, LENGTH = 4, 12, 32, 2048
PACKED, PADDED = 2, 8
"""Rows of a micro-batch: about as many tokens in ours, whose rows are full."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def settled():
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak():
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def clock():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def made(shape, folder):
    """A model of random weights with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(**SHAPES[shape], **ends, max_position_embeddings=8192, tie_word_embeddings=True)
    config.dtype = torch.bfloat16
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n + 3 for n in range(400)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def texts(count, longest):
    draw = random.Random(0)
    return [
        " ".join(f"w{draw.randrange(400)}" for _ in range(min(longest, 64 + int(draw.expovariate(1 / 450)))))
        for _ in range(count)
    ]


def ours(folder, way, rows, at):
    source = at / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    adapter = {"kind": "lora", "rank": 16} if way == "lora" else {"kind": "none"}
    node = Sft(
        model=str(folder),
        adapter=adapter,
        data={"train": [{"kind": "jsonl", "path": str(source)}], "max_length": LENGTH, "lint": "off"},
        batch={"rows": ROWS},
        micro_batch=PACKED,
        steps=STEPS,
        precision="bf16_mixed",
        checkpoint={"every": 10**6},
        out=str(at / "run"),
    )
    account = planned(node, DEVICE, 1, 70 << 30).choice.account
    began = clock()
    artifact = run(node, console=Console(quiet=True))
    whole = clock() - began
    lines = [json.loads(text) for text in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    return {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in train[WARM:]),
        "peak": max(line["peak_memory_bytes"] for line in train),
        "foretold": max(account.load, account.total) - BASE[DEVICE],
        "losses": [line["loss"] for line in train],
        "whole_seconds": whole,
    }


def theirs(folder, way, rows, at):
    """What one writes by hand: padding, sdpa, autocast, fused AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = torch.float32 if way == "full" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=held, attn_implementation="sdpa").to(DEVICE).train()
    if way == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=DEVICE == "cuda")
    speeds = []
    for step in range(STEPS):
        began, tokens = clock(), 0
        for start in range(step * ROWS, (step + 1) * ROWS, PADDED):
            batch = tokenizer(rows[start : start + PADDED], return_tensors="pt", padding=True)
            batch = {k: batch[k].to(DEVICE) for k in ("input_ids", "attention_mask")}
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(**batch, labels=labels, use_cache=False).loss / (ROWS // PADDED)
            loss.backward()
            tokens += int(batch["attention_mask"].sum())
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(tokens / (clock() - began))
    return {"tokens_per_second": statistics.median(speeds[WARM:]), "peak": peak()}


def prompts(count, length):
    draw = random.Random(1)
    return [[draw.randrange(3, 400) for _ in range(length)] for _ in range(count)]


def decode_ours(folder, counts, length, most):
    found = {}
    with LLM(
        str(folder), precision="bf16", device=DEVICE, generator={"kind": "engine", "cache": {"size": 4 << 30}}
    ) as llm:
        sampling = Sampling(max_tokens=most, ignore_eos=True)
        llm.generate(prompts(2, length), Sampling(max_tokens=8, ignore_eos=True))
        for count in counts:
            began = clock()
            told = llm.generate(prompts(count, length), sampling)
            found[count] = sum(len(one.token_ids) for one in told) / (clock() - began)
    return found


def decode_theirs(folder, counts, length, most):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(DEVICE)
    options = {"do_sample": False, "pad_token_id": 0}
    model.generate(torch.tensor(prompts(2, length), device=DEVICE), max_new_tokens=8, **options)
    found = {}
    for count in counts:
        ids = torch.tensor(prompts(count, length), device=DEVICE)
        mask, began = torch.ones_like(ids), clock()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, **options)
        found[count] = count * (out.shape[1] - length) / (clock() - began)
    return found


def told(found):
    """The table."""
    lines = []
    for name, one in found.items():
        if "ours" not in one or "theirs" not in one:
            lines.append(f"{name:16} {one}")
        elif "tokens_per_second" in one["ours"]:
            a, b = one["ours"], one["theirs"]
            rate = a["tokens_per_second"] / b["tokens_per_second"]
            lines.append(
                f"{name:16} ours {a['tokens_per_second']:9,.0f} tok/s {a['peak'] / 2**30:6.2f} GiB "
                f"(foretold {a['foretold'] / 2**30:6.2f})  plain {b['tokens_per_second']:9,.0f} tok/s "
                f"{b['peak'] / 2**30:6.2f} GiB  x {rate:.2f}"
            )
        else:
            each = [
                f"{count}: {one['ours'][count]:8,.0f} / {one['theirs'][count]:8,.0f} x "
                f"{one['ours'][count] / one['theirs'][count]:.2f}"
                for count in one["ours"]
            ]
            lines.append(f"{name:16} ours / generate, tok/s at sequences {', '.join(each)}")
    return "\n".join(lines)


def pairs(folder, shape, sizes):
    """What is measured of a shape: name, ours, theirs."""
    count, length, most = sizes
    rows = texts(STEPS * ROWS, min(1900, count))
    for way in ("lora", "full"):
        yield (
            f"{shape} {way}",
            lambda at, way=way: ours(folder, way, rows, at),
            lambda at, way=way: theirs(folder, way, rows, at),
        )
    counts = (1, 16, 64)
    yield (
        f"{shape} decode",
        lambda at: decode_ours(folder, counts, length, most),
        lambda at: decode_theirs(folder, counts, length, most),
    )


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--to", type=Path, default=Path("gpu.json"))
    options.add_argument("--shapes", default="135m,1b")
    options.add_argument("--budget", type=float, default=150.0)
    options.add_argument("--small", action="store_true")
    said = options.parse_args()
    began, found = time.perf_counter(), {}
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    for shape in ["small"] if said.small else said.shapes.split(","):
        sizes = (100, 16, 8) if said.small else (1900, 128, 128)
        with tempfile.TemporaryDirectory() as held:
            folder = made(shape, Path(held) / "model")
            for what, us, them in pairs(folder, shape, sizes):
                found[what] = {}
                for side, work in (("ours", us), ("theirs", them)):
                    if time.perf_counter() - began > said.budget:
                        found[what][side] = found[what].get(side, {}) or {"left out": "over the budget"}
                        continue
                    settled()
                    with tempfile.TemporaryDirectory() as at:
                        start = time.perf_counter()
                        try:
                            found[what][side] = work(Path(at))
                        except Exception as cause:  # the other figures are worth having
                            found[what].pop(side, None)
                            found[what]["failed"] = f"{side}: {type(cause).__name__}: {cause}"[:400]
                            print(what, found[what]["failed"], file=sys.stderr, flush=True)
                        print(f"{what} {side}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
                said.to.write_text(json.dumps({"device": name, "torch": torch.__version__, "found": found}, indent=1))
    print(f"{name}, torch {torch.__version__}\n{told(found)}")


if __name__ == "__main__":
    main()
