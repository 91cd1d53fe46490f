"""A mixture model whose experts lie on several ranks trains as on one."""

import pytest

from tests.adapters.properties import folder
from tests.distributed import equal, lines, sft, trained

FULL = {"kind": "none"}
LORA = {"kind": "lora", "rank": 4}
OF_EXPERTS = {"kind": "lora", "rank": 3, "parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ADAPTERS = {"full": FULL, "lora": LORA, "experts": OF_EXPERTS}
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}
SLOW = pytest.mark.slow


def both(world, family, rows, tmp_path, split=None, **more):
    """The folders of a run on several ranks, and of one process."""
    model = folder(family)

    def make(out, **parallel):
        return sft(model, rows, out, **({"optim": SGD} | more | parallel))

    split = {"expert": world} if split is None else split
    cut = trained(world, lambda out: make(out, parallel=split), tmp_path, "cut")
    return cut, trained(1, make, tmp_path, "whole")


FAST = {(2, "mixtral", "full"), (4, "qwen3_moe", "experts"), (4, "mixtral", "lora")}
CASES = [(world, family, name) for world in (2, 4) for family in ("mixtral", "qwen3_moe") for name in ADAPTERS]


@pytest.mark.parametrize(
    ("world", "family", "adapter"), [pytest.param(*case, marks=() if case in FAST else SLOW) for case in CASES]
)
def test_training_equals_one_process(world, family, adapter, rows, tmp_path):
    """Packed and accumulated; every weight, LoRA on linears, and LoRA on experts too."""
    split, whole = both(world, family, rows, tmp_path, adapter=ADAPTERS[adapter])
    equal(split, whole)
    assert lines(whole)[0]["loss"] != lines(whole)[2]["loss"]  # the control: it learns


SPLITS = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "copies": {"strategy": "fsdp", "replicate": 2, "shard": 1},
    "ulysses": {"context": 2, "context_method": "ulysses"},
    "ring": {"context": 2, "context_method": "ring"},
}


@pytest.mark.parametrize(
    ("split", "adapter"),
    [
        pytest.param(split, adapter, marks=() if (split, adapter) in {("ddp", "full"), ("fsdp", "experts")} else SLOW)
        for split in SPLITS
        for adapter in ADAPTERS
    ],
)
def test_over_replicas_shards_and_parts_of_rows(split, adapter, rows, tmp_path):
    split = {"expert": 2} | SPLITS[split]
    equal(*both(4, "qwen3_moe", rows, tmp_path, split, adapter=ADAPTERS[adapter]))
