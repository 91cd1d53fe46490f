"""Whether texts depend on what is made beside them is said: by the doctor, in manifests, by the server."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from llmkit import Evaluate
from llmkit.build.exactness import exactness, exactness_here
from llmkit.cli.main import _guarded
from llmkit.inference.node import OwnEngine, Transformers
from llmkit.models.families import tiny as tiny_family
from llmkit.models.ordered import row
from tests.faults import go, sft


def test_a_model_s_is_said_with_its_reason() -> None:
    model = tiny_family("Llama").eval()
    assert exactness(model, Transformers()) == "not known: made by transformers"
    assert exactness(model, OwnEngine(), mixed=True) == "no: products run in 16 bits"
    assert "is bfloat16 on cpu" in exactness(model.to(torch.bfloat16), OwnEngine())


@pytest.mark.skipif(not row(), reason="nothing is compiled here")
def test_a_machine_s_is_said(capfd: Any) -> None:
    assert exactness_here().startswith("fp32 on the CPU always")
    assert _guarded(["doctor", "--json"], False) == 0
    assert json.loads(capfd.readouterr().out)["exact"] == exactness_here()


def test_a_machine_without_kernels_says_what_it_lacks_and_how_it_may_be_had(uncompiled: None) -> None:
    assert "with exact: true, at a cost (linear: LLMKIT_KERNELS=off" in exactness_here()
    model = tiny_family("Llama").eval()
    assert exactness(model, OwnEngine()).startswith("no: nothing is compiled here")
    assert exactness(model, OwnEngine(exact=True)) == "yes"


def test_manifests_of_runs_that_wrote_texts_say_it(tiny: Any, rows: Any, tmp_path: Any) -> None:
    one = {"kind": "jsonl", "path": str(rows)}
    data = {"train": [one], "valid": [one], "max_length": 64}
    made = go(sft(tiny, rows, tmp_path / "run", steps=3, data=data))
    assert (tmp_path / "run" / "samples.jsonl").is_file()
    wanted = exactness(tiny_family("Llama"), OwnEngine())
    assert made.manifest["exact"] == wanted
    task = {"kind": "generation", "data": [one], "rows": 2, "max_tokens": 2}
    engine = {"kind": "engine", "cache": {"size": "1MiB"}}
    found = go(Evaluate(model=str(tiny), tasks=[task], generator=engine, out=str(tmp_path / "asked")))
    assert found.manifest["exact"] == wanted
    scored = {"kind": "perplexity", "data": [one], "rows": 2}
    assert "exact" not in go(Evaluate(model=str(tiny), tasks=[scored], out=str(tmp_path / "scored"))).manifest
