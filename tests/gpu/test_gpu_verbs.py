"""What a user of a GPU meets: the doctor, the server, the memory that was foretold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llmkit import Preference
from llmkit.build.llm import LLM
from llmkit.inference.sampling import Sampling
from llmkit.stages.holding import BASE
from llmkit.stages.planned import planned
from llmkit.stages.policy import Policy
from llmkit.stages.ppo import Ppo
from tests.conftest import make_model, make_tokenizer
from tests.gpu.conftest import GPU
from tests.serve.real import interpreter
from tests.stages.test_sft import go, sft

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 2048}
TEXT = "the quick brown fox jumps over the lazy dog " * 111
SPARE = 0.15
"""Of the peak that was foretold: what the account may be off by."""


def test_the_doctor_names_the_card(gpu: str) -> None:
    done = subprocess.run([sys.executable, "-m", "llmkit", "doctor"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert torch.cuda.get_device_name() in done.stdout
    free = int(re.search(r"free_memory_mib\W+(\d+)", done.stdout).group(1))  # type: ignore[union-attr]
    assert free > 1000


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU], indirect=True)
def test_the_server_answers_as_the_model_in_process(device: str, tiny: Path, tmp_path: Path) -> None:
    said = {"messages": [{"role": "user", "content": "hello world"}], "max_tokens": 6}
    words = ["llmkit", "serve", str(tiny), "--port", "0", "--name", "tiny", "--cache-size", "16MiB"]
    with interpreter(tmp_path / "log", *words, seconds=200) as server:
        told = httpx.post(server.url + "/v1/chat/completions", json=said | {"temperature": 0}, timeout=100)
        assert told.status_code == 200, told.text
        with LLM(str(tiny), generator={"kind": "engine", "cache": {"size": 16 << 20}}, device=device) as llm:
            own = llm.chat(said["messages"], Sampling(max_tokens=6))
        assert told.json()["choices"][0]["message"]["content"] == own.text
        assert httpx.get(server.url + "/metrics", timeout=100).status_code == 200
        assert server.stop() == 0, server.log.read_text()


@pytest.fixture(scope="session")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose parts weigh something."""
    folder = tmp_path_factory.mktemp("middle")
    make_model(**SIZES).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


LORA = {"adapter": {"kind": "lora", "rank": 16}}
PLANS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "full bf16_mixed": {"adapter": "none"},
    "full bf16": {"adapter": "none", "precision": "bf16"},
    "full fp32": {"adapter": "none", "precision": "fp32"},
    "recompute": {"adapter": "none", "memory": {"recompute": "full"}},
    "offload": {"adapter": "none", "memory": {"offload_activations": True}},
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_peak_is_the_one_foretold(plan: str, gpu: str, middle: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(32)))
    used_as_foretold(sft(middle, rows, tmp_path / "run", **given(rows, {"rows": 8}) | PLANS[plan]), gpu)


def given(rows: Path, batch: dict[str, int]) -> dict[str, Any]:
    """What the stages whose peak is foretold share."""
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 1024}
    return {"data": data, "batch": batch, "micro_batch": 4, "steps": 3, "evaluate": {}, "optim": "adamw"}


def used_as_foretold(node: Any, device: str) -> None:
    """The largest allocation of a run is the one that its account says."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    account = planned(node, device, 1, torch.cuda.mem_get_info()[0]).choice.account
    artifact = go(node)
    used = max(line["peak_memory_bytes"] for line in lines(artifact.folder)) - before
    foretold = max(account.load, account.total) - BASE[device]  # what the driver takes is no tensor
    told = f"used {used / 2**20:.0f} MiB, foretold {foretold / 2**20:.0f}: {account.parts}"
    assert abs(used / foretold - 1) < SPARE, told


ALIGNED: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "dpo": (Preference, LORA),
    "dpo, a prompt each": (Preference, LORA | {"share_prompts": False}),
    "dpo, every weight": (Preference, {"adapter": "none", "reference": "model"}),
    "grpo": (Policy, LORA | {"loss": {"kind": "grpo", "beta": 0.1}}),
    "grpo, every weight": (Policy, {"adapter": "none", "reference": "model", "loss": {"kind": "grpo", "beta": 0.1}}),
    "ppo": (Ppo, LORA | {"critic": {"kind": "model", "adapter": {"kind": "lora", "rank": 16}}}),
}


@pytest.mark.parametrize("plan", ALIGNED)
def test_the_peak_of_alignment_is_the_one_foretold(plan: str, gpu: str, middle: Path, tmp_path: Path) -> None:
    kind, more = ALIGNED[plan]
    rows = tmp_path / "rows.jsonl"
    drawn = {"rollout": {"group": 4, "max_tokens": 64}, "reward": [{"kind": "regex", "pattern": "a"}]}
    if kind is Preference:
        made = {"prompt": "hello", "chosen": f" {TEXT}", "rejected": f" {TEXT[4:]}"}
        own = given(rows, {"pairs": 8})
    else:  # three prompts with their answers fill a row
        made = {"prompt": " ".join(TEXT.split()[:950])}
        own = given(rows, {"prompts": 9}) | drawn | {"micro_batch": 1}
    rows.write_text("".join(json.dumps(made) + "\n" for _ in range(32)))
    used_as_foretold(kind(**own | more, model=str(middle), out=str(tmp_path / "run")), gpu)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        one
        for text in (folder / "metrics.jsonl").read_text().splitlines()
        if "peak_memory_bytes" in (one := json.loads(text))
    ]
