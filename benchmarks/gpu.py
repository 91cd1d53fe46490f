"""How fast does one GPU train and answer with llmkit, beside transformers with a plain loop of torch?

    python benchmarks/gpu.py [--to FILE] [--only 135m-full,...] [--budget 150] [--small]

Models have the shapes of SmolLM2-135M and of Llama-3.2-1B and random weights, rows are ragged (64 to 1,900 tokens).
Training: bf16_mixed, LoRA (rank 16, all linears) and full, AdamW; a step is one micro-batch of at most 32,768 tokens of
the small shape and 16,384 of the large one. Tokens that are no padding, per second of wall time between synchronised
ends of steps, the median of the steps after the first ones (which compile, and fill the allocator). The plain loop pads
the same rows, sorted by length, as many in a forward as make that many tokens with their padding: nothing of a GPU is
spared, but a step of it has more forwards. Peaks are what torch allocated; of ours the foretold one beside it.
Decoding: bf16, greedy, prompts of 128 tokens; tokens made per second, the prompts' reading apart: the time for N + 64
tokens less that for N, by 64. `busy` is the share of a profiled step in which a kernel ran. Profiles of a step of
training and of decoding at 64 sequences are in FILE beside the figures (`profile`), as text. `--small` is a try on any
machine. What does not fit into the budget (seconds) is left out, and said.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llmkit import Sft, run
from llmkit.build.llm import LLM
from llmkit.core.console import Console
from llmkit.inference.sampling import Sampling
from llmkit.stages import build_training
from llmkit.stages.holding import BASE
from llmkit.stages.planned import planned

SHAPES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
}
WARM, STEPS, LENGTH = 4, 12, 2048
TOKENS = {"135m": 32768, "1b": 16384, "small": 512}
"""Of a step, at most."""
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


def ours(folder, way, rows, at, tokens):
    length = min(LENGTH, tokens)
    source = at / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    adapter = {"kind": "lora", "rank": 16} if way == "lora" else {"kind": "none"}
    node = Sft(
        model=str(folder),
        adapter=adapter,
        data={"train": [{"kind": "jsonl", "path": str(source)}], "max_length": length, "lint": "off"},
        batch={"rows": len(rows) // STEPS},
        micro_batch=tokens // length,
        steps=STEPS,
        precision="bf16_mixed",
        checkpoint={"every": 10**6},
        out=str(at / "run"),
    )
    account = planned(node, DEVICE, 1, 70 << 30).choice.account
    began, watch = clock(), Profile(STEPS - 2)
    with watch.over(build_training, "_entered"):
        artifact = run(node, console=Console(quiet=True))
    whole = clock() - began
    lines = [json.loads(text) for text in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    steady = train[WARM : STEPS - 2]  # the profiled ones are slower
    return {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steady),
        "mfu": statistics.median(line["mfu"] for line in steady),
        "tokens_a_step": statistics.median(line["tokens"] for line in train),
        "peak": max(line["peak_memory_bytes"] for line in train),
        "foretold": max(account.load, account.total) - BASE[DEVICE],
        "losses": [line["loss"] for line in train],
        "seconds": [line["seconds"] for line in train],
        "whole_seconds": whole,
        **watch.told(),
    }


class Profile:
    """torch's profiler around one call between the `first` call of a hook and the next: a whole step."""

    def __init__(self, first):
        self.first, self.seen, self.made, self.began = first, 0, None, 0.0

    @contextmanager
    def over(self, held, name):
        """Inside, the function `name` of `held`, which is called once a step, begins and ends it."""
        work = getattr(held, name)

        def watched(*given):
            self.turn()
            return work(*given)

        setattr(held, name, watched)
        try:
            yield
        finally:
            setattr(held, name, work)

    def turn(self):
        """A step begins."""
        self.seen += 1
        if self.seen == self.first + 1:
            self.begin()
        elif self.seen == self.first + 2:
            self.end()

    def begin(self):
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
        self.made = profile(activities=kinds)
        self.made.start()
        self.began = clock()

    def end(self):
        self.wall = clock() - self.began
        self.made.stop()

    def told(self):
        """The share of the time in which kernels ran, their number, and the tables."""
        if self.made is None:
            return {}
        averages = self.made.key_averages()
        orders = ["self_cpu_time_total", *(["self_cuda_time_total"] if DEVICE == "cuda" else [])]
        tables = [averages.table(sort_by=order, row_limit=25, max_name_column_width=60) for order in orders]
        found = [one for one in self.made.events() if one.device_type.name == "CUDA"]
        busy = union([(one.time_range.start, one.time_range.end) for one in found]) / 1e6
        calls = {one.key: one.count for one in averages if "ynchronize" in one.key or "Memcpy" in one.key}
        one = {"wall_ms": 1e3 * self.wall, "busy": busy / self.wall, "kernels": len(found), "waits": calls}
        return {"profiled": one, "profile": "\n".join(tables)}


def union(spans):
    """What spans cover together."""
    whole, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        whole += max(0.0, end - max(start, last))
        last = max(last, end)
    return whole


def theirs(folder, way, rows, at, tokens):
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
    speeds, share = [], len(rows) // STEPS
    for step in range(WARM + 4):
        began, seen = clock(), 0
        groups = padded(rows[step * share : (step + 1) * share], tokens)
        for group in groups:
            batch = tokenizer(group, return_tensors="pt", padding=True)
            seen += int(batch["attention_mask"].sum())
            batch = {k: batch[k].to(DEVICE) for k in ("input_ids", "attention_mask")}
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(**batch, labels=labels, use_cache=False).loss / len(groups)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(seen / (clock() - began))
    return {"tokens_per_second": statistics.median(speeds[WARM:]), "peak": peak(), "forwards": len(groups)}


def padded(rows, tokens):
    """Rows sorted by length, as many together as make so many tokens with their padding."""
    groups, longest = [[]], 0
    for row in sorted(rows, key=lambda text: text.count(" ")):
        longest = max(longest, row.count(" ") + 2)
        if (len(groups[-1]) + 1) * longest > tokens and groups[-1]:
            groups.append([])
            longest = row.count(" ") + 2
        groups[-1].append(row)
    return groups


def prompts(count, length):
    draw = random.Random(1)
    return [[draw.randrange(3, 400) for _ in range(length)] for _ in range(count)]


def decode_ours(folder, counts, length, most):
    found = {}
    with LLM(
        str(folder), precision="bf16", device=DEVICE, generator={"kind": "engine", "cache": {"size": 4 << 30}}
    ) as llm:

        def made(count, tokens):
            began = clock()
            told = llm.generate(prompts(count, length), Sampling(max_tokens=tokens, ignore_eos=True))
            assert all(len(one.token_ids) == tokens for one in told)
            return clock() - began

        made(max(counts), 4)
        for count in counts:
            found[count] = decoded(made, count, most)
        watch = Profile(20)
        engine = type(llm.engine)
        with watch.over(engine, "step"):
            made(max(counts), 40)
    return found | watch.told()


def decoded(made, count, most):
    """Tokens per second without the prompts' reading."""
    made(count, 4)
    short, long = made(count, 4), made(count, 4 + most)
    return count * most / (long - short)


def decode_theirs(folder, counts, length, most):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(DEVICE)

    def made(count, tokens):
        ids = torch.tensor(prompts(count, length), device=DEVICE)
        mask, began = torch.ones_like(ids), clock()
        many = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=mask, **many)
        assert out.shape[1] == length + tokens
        return clock() - began

    return {count: decoded(made, count, most) for count in counts}


def told(found):
    """The table; what was left out or failed is said in its place."""
    return "\n".join(line for name, one in found.items() for line in told_one(name, one))


def told_one(name, one):
    a, b = one.get("ours", {}), one.get("theirs", {})
    for side, held in (("ours", a), ("theirs", b)):
        if why := held.get("left out") or held.get("failed"):
            yield f"{name:12} {side:6} {why}"
        elif "tokens_per_second" in held:
            more = f" foretold {held['foretold'] / 2**30:6.2f}, mfu {held['mfu']:.1%}" if "foretold" in held else ""
            yield f"{name:12} {side:6} {held['tokens_per_second']:9,.0f} tok/s {held['peak'] / 2**30:6.2f} GiB{more}"
        elif held:
            each = ", ".join(f"{count}: {rate:8,.0f}" for count, rate in held.items() if isinstance(count, int))
            yield f"{name:12} {side:6} tok/s at sequences {each}"
        if "profiled" in held:
            p = held["profiled"]
            yield f"{name:12} a step {p['wall_ms']:.1f} ms profiled, {p['kernels']} kernels, busy {p['busy']:.0%}"
    rates = [
        f"{key} x {a[key] / b[key]:.2f}"
        for key in a
        if (isinstance(key, int) or key == "tokens_per_second") and key in b
    ]
    if rates:
        yield f"{name:12} ours by theirs: {', '.join(map(str, rates))}"


ORDER = ("135m-full", "135m-lora", "135m-decode", "1b-lora", "1b-decode", "1b-full")
"""What is measured, the most wanted first."""


def works(what, folders, at, small):
    """Ours and theirs of one member."""
    shape, way = what.split("-")
    folder, tokens = folders(shape), TOKENS[shape]
    if way == "decode":
        given = (folder, (1, 16, 64), 16 if small else 128, 8 if small else 64)
        return lambda: decode_ours(*given), lambda: decode_theirs(*given)
    rows = texts(STEPS * rows_of(tokens), 100 if small else 1900)
    return lambda: ours(folder, way, rows, at, tokens), lambda: theirs(folder, way, rows, at, tokens)


def rows_of(tokens):
    """Of a step: that first-fit packs them into one micro-batch; rows have about 500 tokens."""
    return max(2, tokens // 560)


def attempt(what, side, work):
    """One figure; a failure is told in its place, for the other figures are worth having."""
    settled()
    began = time.perf_counter()
    try:
        return work()
    except Exception as cause:
        traceback.print_exc()
        return {"failed": f"{type(cause).__name__}: {cause}"[:300]}
    finally:
        print(f"{what} {side}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--to", type=Path, default=Path("gpu.json"))
    options.add_argument("--only", default=",".join(ORDER))
    options.add_argument("--budget", type=float, default=150.0)
    options.add_argument("--small", action="store_true")
    said = options.parse_args()
    began, found = time.perf_counter(), {}
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    members = ["small-full", "small-lora", "small-decode"] if said.small else said.only.split(",")
    with tempfile.TemporaryDirectory() as top:
        folders = cache(lambda shape: made(shape, Path(top) / shape))
        for what in members:
            found[what] = {}
            for number, side in enumerate(("ours", "theirs")):
                if time.perf_counter() - began > said.budget:
                    found[what][side] = {"left out": "over the budget"}
                    continue
                with tempfile.TemporaryDirectory() as at:
                    work = works(what, folders, Path(at), said.small)[number]
                    found[what][side] = attempt(what, side, work)
            said.to.write_text(json.dumps({"device": name, "torch": torch.__version__, "found": found}, indent=1))
    for what, one in found.items():
        if text := one.get("ours", {}).get("profile"):
            said.to.with_name(f"{said.to.stem}-{what}-profile.txt").write_text(text)
    print(f"{name}, torch {torch.__version__}\n{told(found)}")


if __name__ == "__main__":
    main()
