"""Do the planner's formulas say what public runs on 8 to 512 GPUs measured?

    python benchmarks/plan_published.py [--out FILE]

Each run is described as its page describes it and goes through the formulas of `llmkit/plan`. `EFFICIENCY` of times.py
and what the kinds of recompute keep were set on the runs marked `fixed`, and on nothing else; the others are
predicted, as they were described before their figures were compared; `afterwards` are two that were described wrongly.
What differs
from a run of ours is told apart: whole logits in place of blocks, which products recompute keeps, norms spread over
tensor ranks, a power limit (the peak is taken in proportion), an optimizer that is fused into the backward pass.
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from llmkit.adapters.node import Lora, NoAdapter
from llmkit.core.shape import Shape
from llmkit.models.outline import PUBLIC, tensors
from llmkit.parallel.degrees import Degrees
from llmkit.parallel.node import Fsdp
from llmkit.plan.account import Held, Kept, account
from llmkit.plan.devices import DEVICES
from llmkit.plan.shares import shares
from llmkit.plan.times import Work, times

GIB = 2**30
TITAN = "https://github.com/pytorch/torchtitan/blob/main/"
H100_500W = replace(DEVICES["h100-80gb"], name="H100 96 GB, 500 of 700 W", bandwidth=2.4e12, half=989e12 * 500 / 700)
A100, H100 = DEVICES["a100-80gb"], DEVICES["h100-80gb"]
HALF = Kept(2 * 10, 2 * 4, 2 * 4)
"""bf16 throughout: inputs and outputs of norms, attention, products, gate and its product."""
PER_OP = Kept(2 * 6, 2 * 1, 2 * 1)
"""Selective by operation: a layer's input, attention's output, and every second product (q, v, gate, down)."""


def shape(name):
    return Shape.read(PUBLIC[name], tensors(PUBLIC[name]))


LLAMA_8B, LLAMA_70B = shape("meta-llama/Llama-3.1-8B"), shape("meta-llama/Llama-3.1-70B")
MPT = {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 32768 * 2 // 3}
MPT |= {"num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 50368, "tie_word_embeddings": True}
MPT_70B = Shape.read(MPT, tensors(MPT))
"""MPT's MLP has two products of 4 x the width; three of 8/3 have as many parameters."""


@dataclass(frozen=True)
class Run:
    """A public run: rows x length on each rank, and what its page says."""

    title: str
    source: str
    shape: Shape
    device: object
    degrees: Degrees
    rows: int
    length: int
    recompute: int = 0
    kept: Kept = HALF
    again: float = 0.0
    """Share of the forward that recompute by operation makes again."""
    adapter: object = NoAdapter()
    master: bool = True
    """Weights are held in fp32 beside the bf16 that is gathered."""
    moments: float = 8.0
    logits: float = 2 + 4 + 4
    """Bytes of a logit that are there at once: of 16 bits, in fp32, its gradient; less where the loss is compiled."""
    spread: bool = False
    """Norms and logits are spread over tensor ranks."""
    tokens: float = 0.0
    """Tokens a second and GPU, as published; 0 where it is not, or where it is of fp8."""
    memory: float = 0.0
    """GiB, as published."""
    fixed: bool = False
    parts: int = 0
    """Ranks that weights are cut over, where its tool cuts over more than those that see other rows."""
    after: bool = False
    """Described anew after the blind prediction was off."""


TABLES = f"{TITAN}benchmarks/llama3_h100_202412_torchtitan.md"
OLD = f"{TITAN}docs/performance.md (of 2024)"
FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
TUNE = "https://github.com/pytorch/torchtune/blob/main/README.md (of September 2024)"
RUNS = [
    Run("8B, FSDP 8, selective by op", f"{TABLES} table 1", LLAMA_8B, H100_500W, Degrees(shard=8), 2, 8192,
        kept=PER_OP, again=0.4, tokens=5762, memory=82.4, fixed=True),
    Run("8B, FSDP 64, selective by op", OLD, LLAMA_8B, A100, Degrees(shard=64), 1, 8192,
        kept=PER_OP, again=0.4, tokens=2973, fixed=True),
    Run("MPT 70B, FSDP 64, full", FOUNDRY, MPT_70B, H100, Degrees(shard=64), 8, 2048,
        recompute=1, tokens=1039, fixed=True),
    Run("8B, FSDP 128, selective by op", f"{TABLES} table 3", LLAMA_8B, H100_500W, Degrees(shard=128), 2, 8192,
        kept=PER_OP, again=0.4, tokens=5605, memory=67.0),
    Run("70B, FSDP 64, full", OLD, LLAMA_70B, A100, Degrees(shard=64), 1, 8192, recompute=1, tokens=331),
    Run("8B, FSDP 64, selective by layer", OLD, LLAMA_8B, A100, Degrees(shard=64), 1, 8192, recompute=2, tokens=2904),
    Run("MPT 70B, FSDP 32, full", FOUNDRY, MPT_70B, H100, Degrees(shard=32), 2, 2048, recompute=1, tokens=882),
    Run("70B, FSDP 32 x tensor 8, full (speed is fp8's)", f"{TABLES} table 4", LLAMA_70B, H100_500W,
        Degrees(shard=32, tensor=8), 16, 8192, recompute=1, spread=True, memory=71.9),
    Run("8B, FSDP 8, full, rows of 32768 (speed is fp8's)", f"{TABLES} table 2", LLAMA_8B, H100_500W,
        Degrees(shard=8), 1, 32768, recompute=1, memory=83.9),
    Run("8B, FSDP 2 x context 4, full, rows of 131072", f"{TABLES} table 2", LLAMA_8B, H100_500W,
        Degrees(shard=2, context=4), 1, 131072, recompute=1, memory=84.0),
    Run("70B LoRA, FSDP 8, full", TUNE, LLAMA_70B, A100, Degrees(shard=8), 2, 2048, recompute=1,
        adapter=Lora(rank=16, targets=("q_proj", "v_proj", "o_proj")), master=False, tokens=3497 / 8, memory=27.6),
    Run("as before: that tool cuts weights over the context ranks too", f"{TABLES} table 2", LLAMA_8B, H100_500W,
        Degrees(shard=2, context=4), 1, 131072, recompute=1, memory=84.0, parts=8, after=True),
    Run("as before: its loss makes the logits in 8 parts", TUNE, LLAMA_70B, A100, Degrees(shard=8), 2, 2048,
        recompute=1, adapter=Lora(rank=16), master=False, logits=10 / 8, tokens=3497 / 8, memory=27.6, after=True),
]  # fmt: skip


def predicted(run):
    """(GiB, tokens a second and GPU)."""
    cost, cut = run.adapter.cost(run.shape), shares(Fsdp(), run.degrees)
    cut = replace(cut, between=run.degrees.tensor) if run.spread else cut
    cut = replace(cut, weights=run.parts, gradients=run.parts, optimizer=run.parts) if run.parts else cut
    cost = replace(cost, trained=run.shape.params) if isinstance(run.adapter, NoAdapter) else cost
    word = 4.0 if run.master else 2.0
    tokens = run.rows * run.length
    local = tokens / run.degrees.context / (run.degrees.tensor if run.spread else 1)
    held = Held(word, word, run.kept, cost, run.moments, run.recompute, int(run.logits * run.shape.vocab * local))
    held = replace(held, short=2.0, base=GIB)
    whole = account(run.shape, replace(held, head_bytes=0), tokens, cut).total + held.head_bytes
    made = times(run.shape, held, cut, run.degrees, run.device, Work(tokens, run.length, 1))
    compute = made.compute * (1 + run.again / 3)
    seconds = compute + made.waiting + made.update
    return whole / GIB, tokens / seconds / run.degrees.context / run.degrees.tensor


def lines():
    yield "| run | GPUs | memory, GiB: predicted | published | error | tokens/s/GPU: predicted | published | error | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    errors = []
    for run in RUNS:
        told, cells = predicted(run), []
        for mine, theirs, form in zip(told, (run.memory, run.tokens), (".1f", ",.0f"), strict=True):
            error = mine / theirs - 1 if theirs else None
            cells += [f"{mine:{form}}", f"{theirs:{form}}" if theirs else "", "" if error is None else f"{error:+.0%}"]
            if error is not None and not run.fixed and not run.after:
                errors.append(abs(error))
        kind = "fixed" if run.fixed else "afterwards" if run.after else "predicted"
        yield f"| {run.title} | {run.degrees.world} | {' | '.join(cells)} | [{kind}]({run.source.split(' ')[0]}) |"
    yield ""
    yield f"Of the {len(errors)} figures predicted blind: median error {statistics.median(errors):.0%}, "
    yield f"largest {max(errors):.0%}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Where the table goes.")
    args = parser.parse_args()
    text = "\n".join(lines()) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
