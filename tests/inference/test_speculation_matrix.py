"""Every drafter with every feature that is no way of choosing (those are in test_speculation.py): the same answers,
log-probabilities and ends. The table is in docs/speculation.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llmkit_kernels.build import lacks
from peft import LoraConfig, PromptTuningConfig

from llmkit.cli.speculation.drafters import DRAFTERS
from llmkit.cli.speculation.equality import Compared, compared
from llmkit.cli.speculation.parts import FAMILIES, Asked, of_family, real
from llmkit.cli.speculation.parts import equality as equal
from llmkit.cli.speculation.tiny import family, lively
from llmkit.cli.speculation.trial import Trial
from llmkit.cli.speculation.ways import WAYS, asked
from llmkit.inference.adapters import Adapters
from llmkit.inference.request import Request
from tests.models.test_loras import ALL, saved

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
FAR = 1e12
"""A deadline that is never reached; 0 has passed."""
Change = Callable[[int, Request], Request]
REQUESTS: dict[str, Change] = {
    "priority": lambda at, one: replace(one, priority=-at),
    "tenants": lambda at, one: replace(one, tenant="abc"[at % 3]),
    "foretold": lambda at, one: replace(one, prediction=(*one.prompt, 5, 7, 11, *range(20, 30))),
    "deadline": lambda at, one: replace(one, deadline=0.0 if at % 3 == 0 else FAR),
}


def every(trial: Trial, requests: list[Request], names: Iterable[str] = DRAFTERS) -> dict[str, Compared]:
    """Each drafter in a schedule of its own; all draft, and nothing differs."""
    makers = {name: DRAFTERS[name] for name in names}
    found = compared(trial, requests, makers, range(len(makers)))
    assert {name: one.first for name, one in found.items() if one.different} == {}
    assert [name for name, one in found.items() if one.leaked or not one.drafted] == []
    return found


def changed(way: str, change: Change, count: int = 4) -> list[Request]:
    return [change(at, one) for at, one in enumerate(asked(5, count, way))]


@here
@pytest.mark.parametrize("name", REQUESTS)
def test_what_a_request_says_beside_its_sampling(name: str) -> None:
    requests = changed("drawn", REQUESTS[name])
    found = every(of_family("Llama"), requests)
    assert all(one.answers == len(requests) for one in found.values())


@here
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_caches_of_fewer_bits(dtype: torch.dtype) -> None:
    every(Trial(lively(), dtype=dtype), asked(5, 3, "told"))


@here
def test_adapters_and_virtual_tokens(tmp_path: Path) -> None:
    saved(tmp_path / "lora", LoraConfig(r=4, lora_alpha=8, target_modules=ALL))
    saved(tmp_path / "soft", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    trial = Trial(family("Llama"))
    trial.adapters = Adapters(trial.decoder.bank, tmp_path)
    for name in ("lora", "soft"):
        trial.adapters.load(name, name)
    every(trial, changed("drawn", lambda at, one: replace(one, adapter=("", "lora", "soft")[at % 3])))
    assert not any(version.holders for version in trial.adapters.named.values())


def test_exact_where_nothing_is_compiled(uncompiled: None) -> None:
    trial = Trial(lively())
    assert trial.decoder.exact
    every(trial, asked(5, 2, "drawn"))


@here
def test_what_is_greedy_and_drawn_side_by_side() -> None:
    """Requests of all ways in one engine."""
    requests = [replace(one, id=way) for way in WAYS if way != "beams" for one in asked(6, 1, way)]
    every(of_family("Llama"), requests, ("branching", "several", "head"))


@here
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_thousand_answers() -> None:
    """All drafters, ways of choosing, families, lengths, batches, chunks, preemptions."""
    checks = [check for job in equal(Asked(sequences=5000)) for check in job()]
    assert [check for check in checks if check.status != "passed"] == []
    said = next(check.why for check in checks if check.name == "schedules of all kinds")
    assert int(said.split()[0]) >= 5000 and len(FAMILIES) == 4


@here
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_a_real_model() -> None:
    """SmolLM2-135M."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        checks = [check for job in real(Asked(model="smollm2-135m-instruct-q4")) for check in job()]
    finally:
        torch.set_num_threads(threads)
    assert checks and [check for check in checks if check.status != "passed"] == []
