"""A model that is cut over ranks is read a layer at a time: the same bits as read whole, and not the memory."""

import pytest

from llmkit import run
from llmkit.adapters.node import Lora, NoAdapter
from llmkit.core.console import Console
from tests.adapters.properties import folder
from tests.distributed import equal, sft, together

SAID = "layers are read as they are cut"
ZERO = {"strategy": {"kind": "zero", "stage": 3}}
CASES = {
    "fsdp": (2, {"strategy": "fsdp"}, "none", "qwen3"),
    "hybrid": (4, {"strategy": "fsdp", "replicate": 2, "shard": 2}, "lora", "llama"),
    "tensor": (2, {"tensor": 2}, "lora", "llama"),
    "experts": (2, {"tensor": 2}, "none", "qwen3_moe"),
    "zero": (2, ZERO, "none", "gemma3"),
}

SLOW = ("hybrid", "experts", "zero")


@pytest.fixture(autouse=True)
def imported():
    """Once, for all forked ranks."""
    pytest.importorskip("deepspeed")
    from llmkit.parallel.zero_engine import imported

    imported("cpu")


class Told(Console):
    """What a run says."""

    def __init__(self):
        super().__init__(quiet=True, mute=True)
        self.lines = []

    def notice(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("case", ["fsdp", "tensor", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)])
def test_the_same_bits_as_read_whole(case, rows, tmp_path, monkeypatch):
    world, parallel, adapter, family = CASES[case]
    kind = {"none": {"kind": "none"}, "lora": {"kind": "lora", "rank": 4}}[adapter]

    def trained(name, told):
        made = sft(folder(family), rows, tmp_path / name, parallel=parallel, adapter=kind, steps=2)

        def work(rank):
            console = Told()
            run(made, console=console)
            assert any(line.startswith(told) for line in console.lines), console.lines

        together(world, work, tmp_path)
        return tmp_path / name

    ours = trained("ours", SAID)
    for node in (NoAdapter, Lora):
        monkeypatch.setattr(node, "blind", lambda self: False)
    equal(ours, trained("whole", "each rank reads the whole model"), tol=0)
