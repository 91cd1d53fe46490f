"""A model that is cut over ranks is read a layer at a time: the same bits as read whole, and not the memory."""

import ctypes
import threading
from pathlib import Path

import pytest
import torch
from llmkit_kernels import memory
from transformers import LlamaConfig, LlamaForCausalLM

from llmkit import run
from llmkit.adapters.node import Lora, NoAdapter
from llmkit.build.precision import types
from llmkit.build.training import build, parts
from llmkit.core.console import Console
from llmkit.core.ranks import ranks
from llmkit.models.load import How
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.parallel.grid import grid
from llmkit.parallel.group import joined
from llmkit.parallel.node import Fsdp, Parallel, Zero
from llmkit.parallel.optimizers import Optimizers
from llmkit.parallel.zero import _read
from llmkit.parallel.zero_engine import imported
from tests.adapters.properties import folder
from tests.conftest import make_tokenizer
from tests.distributed import equal, sft, together

SAID = "layers are read as they are cut"
ZERO = {"strategy": {"kind": "zero", "stage": 3}}
CASES = {
    "fsdp": (2, {"strategy": "fsdp"}, "none", "qwen3"),
    "quantised": (2, {"strategy": "fsdp"}, "nf4", "llama"),
    "hybrid": (4, {"strategy": "fsdp", "replicate": 2, "shard": 2}, "lora", "llama"),
    "tensor": (2, {"tensor": 2}, "lora", "llama"),
    "experts": (2, {"tensor": 2}, "none", "qwen3_moe"),
    "zero": (2, ZERO, "none", "gemma3"),
}

SLOW = ("hybrid", "quantised", "experts", "zero")


@pytest.fixture(autouse=True)
def deepspeed():
    """Once, for all forked ranks."""
    pytest.importorskip("deepspeed")
    imported("cpu")


class Told(Console):
    """What a run says."""

    def __init__(self):
        super().__init__(quiet=True, mute=True)
        self.lines = []

    def notice(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(
    "case",
    [
        "tensor",
        pytest.param("fsdp", marks=pytest.mark.slow),
        *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW),
    ],
)
def test_the_same_bits_as_read_whole(case, rows, tmp_path, monkeypatch):
    world, parallel, adapter, family = CASES[case]
    kind = {"kind": "none"} if adapter == "none" else {"kind": "lora", "rank": 4}
    quant = {"kind": "bnb_nf4"} if adapter == "nf4" else {"kind": "none"}

    def trained(name, told):
        made = sft(folder(family), rows, tmp_path / name, parallel=parallel, adapter=kind, quant=quant, steps=2)

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


def anonymous():
    """Bytes of this process's own memory: pages of mapped files, which ranks share, are none of it."""
    said = Path("/proc/self/status").read_text()
    return int(said.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The most memory of its own that a process has while something is done, beyond what it has before."""

    def __enter__(self):
        self.done, self.before = threading.Event(), anonymous()
        self.most = self.before
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.bytes = self.most - self.before


LAYER, LAYERS = 4 * (4 * 512 * 512 + 3 * 512 * 2048), 12
"""Bytes of the matrices of a layer in fp32."""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of a hundred MB in bf16, made by a process whose memory goes with it."""
    path = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 8, "vocab_size": 448, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def work(rank):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(path)
        make_tokenizer().save_pretrained(path)

    together(1, work, path)
    return path


STRATEGIES = {
    "fsdp": (Parallel(strategy=Fsdp()), NoAdapter()),
    "tensor": (Parallel(tensor=2), NoAdapter()),
    "zero": (Parallel(strategy=Zero()), NoAdapter()),
    "lora": (Parallel(strategy=Fsdp()), Lora(rank=4)),
}
ROOM = 24 << 20
"""What else comes with a first forward pass: buffers of libraries, threads' stacks."""


def load(path, kind, deferred):
    """The most memory that it takes to load the model in fp32 on this rank of two and to cut it."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is given back at once
    memory.trim()  # what earlier tests of this process left free would hide what is taken
    ctypes.CDLL(None).malloc_trim(0)
    parallel, adapter = STRATEGIES[kind]
    with joined(ranks(), "cpu") as group:
        how, ref = How(dtype="fp32", deferred=deferred), ModelRef(name=str(path))
        around = grid(parallel.degrees(2), "cpu", group)
        with Peak() as peak:
            built = build(resolve(ref), ref, how, adapter, 0, 0)
            given = parts(built, lambda params: Optimizers([torch.optim.SGD(params.values())]), types("fp32", "cpu"))
            if kind == "zero":  # before DeepSpeed copies what a rank holds, for its updates
                imported("cpu")
                _read(given, parallel.strategy.settings("fp32"))
            else:
                parallel.stepper(given, around)
        return peak.bytes


@pytest.mark.parametrize(
    "kind", ["fsdp", *(pytest.param(one, marks=pytest.mark.slow) for one in ("tensor", "zero", "lora"))]
)
def test_a_rank_holds_its_part_and_a_layer_at_most(kind, large, tmp_path):
    """The control: read whole, each rank holds more than the whole."""
    found = {}
    for deferred in (True, False):
        said = tmp_path / str(deferred)
        said.mkdir()

        def work(rank, said=said, deferred=deferred):
            (said / str(rank)).write_text(str(load(large, kind, deferred)))

        together(2, work, said, 120)
        found[deferred] = max(int((said / str(rank)).read_text()) for rank in range(2))
    half, all_ = LAYER * LAYERS // 2, LAYER * LAYERS
    assert found[True] < half + 2 * LAYER + ROOM, found
    assert found[False] > all_ > half + 2 * LAYER + ROOM, found
