"""Whole training stages on a device: every precision and lever learns, is repeated to the bit, and is named when memory
gives out. On the CPU a few of them, so that what a GPU runs is known to be sound."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit import Artifact
from llmkit.core.errors import ResourceError
from llmkit.core.ranks import free_port
from llmkit.recipe import execute
from tests.conftest import make_model, make_tokenizer
from tests.gpu.conftest import GPU
from tests.stages.test_sft import go, metrics, sft

FULL = {"adapter": "none", "optim": {"kind": "adamw", "lr": 3e-3}}
METHODS: dict[str, dict[str, Any]] = {
    "lora fp32": {"precision": "fp32"},
    "lora bf16": {"precision": "bf16"},
    "lora bf16_mixed": {"precision": "bf16_mixed"},
    "lora fp16_mixed": {"precision": "fp16_mixed"},
    "dora": {"adapter": {"kind": "lora", "rank": 4, "dora": True}},
    "full fp32": FULL | {"precision": "fp32"},
    "full bf16": FULL | {"precision": "bf16"},
    "full bf16_mixed": FULL | {"precision": "bf16_mixed"},
    "full fp16_mixed": FULL | {"precision": "fp16_mixed"},
    "full fp8": FULL | {"precision": "fp8"},
    "recompute": FULL | {"memory": {"recompute": "full"}},
    "selective": FULL | {"memory": {"recompute": "selective"}},
    "offload": FULL | {"memory": {"offload_activations": True}},
    "in backward": {"adapter": "none", "optim": {"kind": "adamw", "clip": 0, "lr": 3e-3}}
    | {"memory": {"optimizer_in_backward": True}},
    "qlora": {"quant": "bnb_nf4"},
    "int8": {"quant": "bnb_int8"},
    "paged": {"quant": "bnb_nf4", "optim": {"kind": "paged_adamw_8bit", "lr": 1e-2}},
    "adamw 8bit": {"optim": {"kind": "adamw_8bit", "lr": 1e-2}},
    "muon": {"adapter": "none", "optim": {"kind": "muon"}},
    "flex": {"attention": "flex", "precision": "fp32"},
    "unpacked": {"packing": "none"},
    "deterministic": FULL | {"deterministic": True},
}
HERE = ("lora bf16_mixed", "deterministic")
"""Those that the CPU tries here; tests/stages has the others."""
NEEDS = {
    "full fp8": "torchao",
    **dict.fromkeys(("qlora", "int8", "paged", "adamw 8bit"), "bitsandbytes"),
}


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose sides are multiples of 16, as fp8 wants them."""
    folder = tmp_path_factory.mktemp("sound")
    make_model(hidden_size=64, intermediate_size=96, vocab_size=448).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def node(model: Path, rows: Path, out: Path, **more: Any) -> Any:
    """A stage of six steps."""
    given = {"model": {"name": str(model), "attention": more.pop("attention", "auto")}}
    source = [{"kind": "jsonl", "path": str(rows)}]
    given["data"] = {"train": source, "valid": source, "max_length": 96, "packing": more.pop("packing", "first_fit")}
    return sft(model, rows, out, **(given | more))


def losses(artifact: Artifact, event: str = "train", name: str = "loss") -> list[float]:
    return [line[name] for line in metrics(artifact.folder) if line["event"] == event]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, device: str, sound: Path, rows: Path, tmp_path: Path) -> None:
    if device == "cpu" and method not in HERE:
        pytest.skip("tests/stages has it on the CPU")
    if method in NEEDS and find_spec(NEEDS[method]) is None:
        pytest.skip(f"{NEEDS[method]} is not installed")
    artifact = go(node(sound, rows, tmp_path / "run", **METHODS[method]))
    seen = losses(artifact, "evaluate", "valid.loss")
    assert seen[-1] < seen[0] - 0.05, seen
    artifact.verify()


def test_losses_in_fp32_are_those_of_the_cpu(
    gpu: str, sound: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs is the order of sums: by SGD, which keeps small differences small."""
    seen = []
    for where in ("cuda", "cpu"):
        monkeypatch.setattr(execute, "device", lambda where=where: where)
        more = {"adapter": "none", "optim": {"kind": "sgd", "lr": 0.1, "momentum": 0.0}, "precision": "fp32"}
        seen.append(losses(go(node(sound, rows, tmp_path / where, **more))))
    assert seen[0] == pytest.approx(seen[1], rel=2e-5)


@pytest.mark.parametrize("method", ["lora bf16_mixed", "full bf16_mixed"])
def test_a_killed_run_goes_on_to_the_bit(method: str, gpu: str, sound: Path, rows: Path, tmp_path: Path) -> None:
    more = METHODS[method] | {"deterministic": True, "checkpoint": {"every": 2, "keep": 9}, "micro_batch": 2}
    ends = {}
    for name in ("whole", "killed"):
        made = node(sound, rows, tmp_path / name, steps=40, **more)
        if name == "killed":
            killed(sound, rows, tmp_path / name, steps=40, **more)
            assert not (tmp_path / name / "manifest.json").exists()
        artifact = go(made)
        files = sorted(artifact.model().glob("*.safetensors"))
        ends[name] = [file.read_bytes() for file in files], metrics(artifact.folder)
    assert ends["whole"] == ends["killed"]


def killed(model: Path, rows: Path, out: Path, **more: Any) -> None:
    """The same run in a process of its own, which is killed once it has a checkpoint and went on."""
    said = json.dumps([str(model), str(rows), str(out), more])
    code = (
        "import json, sys; from pathlib import Path; from tests.gpu.test_gpu_training import go, node; "
        "model, rows, out, more = json.loads(sys.argv[1]); go(node(Path(model), Path(rows), Path(out), **more))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, said], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if any(out.glob("checkpoints/step-*")) and len((out / "metrics.jsonl").read_text().splitlines()) > 6:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    assert process.returncode == -signal.SIGKILL, "it was not killed in the midst"


def test_memory_that_gives_out_is_named(gpu: str, sound: Path, rows: Path, tmp_path: Path) -> None:
    """The account is passed by: what it cannot know, others on the same card, is what gives out.
    Where that is while the model is read, there is no run folder yet."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (2 << 20)) / total)
    hog = [filled for size in (1 << 20, 1 << 16, 1 << 12, 512) for filled in until_full(size, gpu)]
    try:
        with pytest.raises(ResourceError, match=r"memory gave out .*MiB are free.*fix: "):
            go(node(sound, rows, tmp_path / "run", **FULL))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del hog
    status = tmp_path / "run" / "status.json"
    said = json.loads(status.read_text()) if status.exists() else None
    assert said is None or (said["state"] == "failed" and "memory gave out" in json.dumps(said))


def until_full(size: int, device: str) -> Iterator[torch.Tensor]:
    """What the allocator has left, in tensors of `size` bytes: gaps between those of earlier tests too."""
    while True:
        try:
            yield torch.empty(size, dtype=torch.uint8, device=device)
        except torch.cuda.OutOfMemoryError:
            return


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU], indirect=True)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_of_a_group_is_one_process(
    strategy: str, device: str, sound: Path, rows: Path, tmp_path: Path
) -> None:
    """Over nccl on a GPU, over gloo on a CPU."""
    more = {"adapter": "none", "optim": {"kind": "sgd", "lr": 0.1}, "precision": "fp32", "steps": 3}
    alone = losses(go(node(sound, rows, tmp_path / "alone", **more)))
    said = json.dumps([str(sound), str(rows), str(tmp_path / "group"), {**more, "parallel": {"strategy": strategy}}])
    code = (
        "import json, sys; from pathlib import Path; from tests.gpu.test_gpu_training import go, grouped, node; "
        "model, rows, out, more = json.loads(sys.argv[1]); grouped(); "
        "go(node(Path(model), Path(rows), Path(out), **more))"
    )
    subprocess.run([sys.executable, "-c", code, said], check=True, timeout=200)
    assert losses(Artifact(tmp_path / "group")) == pytest.approx(alone, rel=1e-5)


def grouped() -> None:
    """One process joins a group too."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    vars(execute)["check_ranks"] = lambda recipe, mine: recipe.stages[0][1]
