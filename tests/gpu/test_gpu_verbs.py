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

from llmkit.build.llm import LLM
from llmkit.inference.sampling import Sampling
from llmkit.stages.holding import BASE
from llmkit.stages.planned import planned
from tests.conftest import make_model, make_tokenizer
from tests.gpu.conftest import GPU
from tests.serve.real import interpreter
from tests.stages.test_sft import go, sft

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 2048}
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


PLANS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 16}},
    "full bf16_mixed": {"adapter": "none"},
    "full bf16": {"adapter": "none", "precision": "bf16"},
    "full fp32": {"adapter": "none", "precision": "fp32"},
    "recompute": {"adapter": "none", "memory": {"recompute": "full"}},
    "offload": {"adapter": "none", "memory": {"offload_activations": True}},
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_peak_is_the_one_foretold(plan: str, gpu: str, middle: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    text = "the quick brown fox jumps over the lazy dog " * 111
    rows.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(32)))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 1024}
    options = {"data": data, "batch": {"rows": 8}, "micro_batch": 4, "steps": 3, "evaluate": {}, "optim": "adamw"}
    node = sft(middle, rows, tmp_path / "run", **(options | PLANS[plan]))
    account = planned(node, gpu, 1, torch.cuda.mem_get_info()[0]).choice.account
    artifact = go(node)
    used = max(line["peak_memory_bytes"] for line in lines(artifact.folder)) - before
    foretold = max(account.load, account.total) - BASE[gpu]  # what the driver takes is no tensor
    assert abs(used / foretold - 1) < SPARE, (
        f"{plan}: used {used / 2**20:.0f} MiB, foretold {foretold / 2**20:.0f}: {account.parts}"
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        one
        for text in (folder / "metrics.jsonl").read_text().splitlines()
        if "peak_memory_bytes" in (one := json.loads(text))
    ]
