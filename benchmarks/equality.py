"""Does a run on several ranks give what one process gives?

    python benchmarks/equality.py [--only TEXT] [--families llama,...] [--real] [--out FILE]

Three steps of fine-tuning (packed, accumulated, plain SGD in fp32) of a tiny model of each family, every weight and
LoRA, under each strategy and composition over gloo, beside the same on one process. What is shown is the largest
difference of losses, of gradient norms and of weights, relative to the largest value of each tensor; the bar is 1e-5.
`--real` takes the 135M model under `ddp`, `fsdp` and `zero` instead. `--out` writes the table as markdown.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there: ranks are forked, and threads that were made do not follow
from tests.adapters.properties import folder
from tests.distributed import lines, sft, trained, weights

FSDP, ZERO = {"strategy": {"kind": "fsdp"}}, {"kind": "zero"}
CASES = {
    "ddp": (2, {"strategy": "ddp"}),
    "ddp, 4 ranks": (4, {"strategy": "ddp"}),
    "fsdp": (2, FSDP),
    "fsdp, 4 ranks": (4, FSDP),
    "fsdp, offloaded": (2, {"strategy": {"kind": "fsdp", "offload": "cpu"}}),
    "hybrid 2 x 2": (4, FSDP | {"replicate": 2, "shard": 2}),
    "zero 1": (2, {"strategy": ZERO | {"stage": 1}}),
    "zero 2": (2, {"strategy": ZERO | {"stage": 2}}),
    "zero 3": (2, {"strategy": ZERO}),
    "zero 3, 4 ranks": (4, {"strategy": ZERO}),
    "zero 3, offloaded": (2, {"strategy": ZERO | {"offload": {"optimizer": "cpu", "params": "cpu"}}}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 4": (4, {"tensor": 4}),
    "ulysses 2": (2, {"context": 2, "context_method": "ulysses"}),
    "ring 2": (2, {"context": 2, "context_method": "ring"}),
    "ring 4": (4, {"context": 4, "context_method": "ring"}),
    "ddp x tensor": (4, {"strategy": "ddp", "tensor": 2}),
    "fsdp x tensor": (4, FSDP | {"tensor": 2}),
    "ddp x context": (4, {"strategy": "ddp", "context": 2}),
    "fsdp x context": (4, FSDP | {"context": 2}),
    "tensor x context": (4, {"tensor": 2, "context": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "ddp x pipeline": (4, {"strategy": "ddp", "pipeline": 2}),
}
"""Name -> (ranks, the recipe's `parallel`): a new strategy is a line here."""
MIXTURES = {
    "expert 2": (2, {"expert": 2}),
    "expert 4": (4, {"expert": 4}),
    "ddp x expert": (4, {"strategy": "ddp", "expert": 2}),
    "expert x context": (4, {"expert": 2, "context": 2}),
}
"""As `CASES`, of models that have experts."""
REAL = ("ddp", "fsdp", "zero 3")
METHODS = {"full": {"kind": "none"}, "lora": {"kind": "lora", "rank": 4}}
FAMILIES = ("llama", "qwen3", "gemma3", "mixtral")
BAR = 1e-5


def make_rows():
    """24 conversations of many lengths."""
    for i in range(24):
        question, answer = " ".join(["hello world"] * (1 + i % 5)), " ".join(["the lazy dog"] * (1 + i % 3))
        yield {"messages": [{"role": "user", "content": f"{question} {i}"}, {"role": "assistant", "content": answer}]}


def gaps(ours, theirs):
    """The largest relative differences of two runs: losses, gradient norms, weights."""
    steps = list(zip(lines(ours), lines(theirs), strict=True))
    found = [max(abs(a[key] - b[key]) / abs(b[key]) for a, b in steps) for key in ("loss", "grad_norm")]
    held, wanted = weights(ours), weights(theirs)
    apart = [float((held[name] - t).abs().max() / t.abs().max().clamp_min(1e-30)) for name, t in wanted.items()]
    return [*found, max(apart)]


def measured(family, method, cases, work, rows, real=False):
    """Of each case the gaps, or why it did not run."""
    model = "smollm2-135m-instruct-q4" if real else folder(family)
    rate = 0.01 if real else 0.1
    options = {"adapter": METHODS[method], "optim": {"kind": "sgd", "lr": rate, "momentum": 0.0}}
    options |= {"batch": {"rows": 4}} if real else {}
    make = partial(sft, model, rows, **options)
    seconds = 1800.0 if real else 120.0
    place = work / f"{family}-{method}"
    place.mkdir()
    alone = trained(1, make, place, "alone")
    for name, (world, parallel) in cases.items():
        title = name.replace(" ", "-").replace(",", "")
        try:
            ours = trained(world, lambda out, how=parallel: make(out, parallel=how), place, title, seconds)
            yield name, world, gaps(ours, alone)
        except AssertionError as error:
            yield name, world, str(error).strip().splitlines()[-1][:160]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Cases whose name holds this.")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--real", action="store_true", help="The 135M model.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table = ["| strategy | ranks | model | method | loss | gradient norm | weights |", "|---" * 7 + "|"]
    worst, over, said = [0.0, 0.0, 0.0], 0, []
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        rows = work / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
        for family in ("135M",) if args.real else args.families.split(","):
            known = CASES | (MIXTURES if "mix" in family or "moe" in family else {})
            cases = {name: case for name, case in known.items() if args.only in name}
            cases = {name: case for name, case in cases.items() if not args.real or name in REAL}
            for method in METHODS:
                for name, world, found in measured(family, method, cases, work, rows, args.real):
                    if isinstance(found, str):
                        said.append(f"{name}, {family}, {method}: {found}")
                        print(said[-1], flush=True)
                        continue
                    worst = list(map(max, worst, found))
                    over += max(found) > BAR
                    table.append(
                        f"| {name} | {world} | {family} | {method} | " + " | ".join(f"{g:.1e}" for g in found) + " |"
                    )
                    print(table[-1], flush=True)
    table += ["", f"{len(table) - 2 - over} of {len(table) - 2} within {BAR:g}; the largest: "]
    table[-1] += ", ".join(f"{kind} {gap:.1e}" for kind, gap in zip(("loss", "norm", "weights"), worst, strict=True))
    table += [f"- {line}" for line in said]
    print("\n".join(table[-1 - len(said) :]))
    if args.out:
        args.out.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
