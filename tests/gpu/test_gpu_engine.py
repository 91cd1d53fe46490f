"""The engine on a device: tokens of transformers' `generate`, rows that do not depend on each other where that is asked
for, adapters by row, int8 keys, weights changed in place, and no step that waits layer by layer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from llmkit.build.cache import store_of
from llmkit.build.llm import LLM
from llmkit.core.errors import ModelError
from llmkit.core.types import Paged, Span
from llmkit.inference.blocks import Blocks
from llmkit.inference.cache import Cache
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.request import Request
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Texts
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.paged import BlockStore
from tests.conftest import make_model, make_tokenizer
from tests.gpu.conftest import GPU
from tests.inference.exact import Trial, some
from tests.inference.test_engine import answers

FAMILIES = ("Llama", "Qwen3", "Gemma-2", "Mistral", "Phi-3", "Gemma-3", "gpt-oss", "Mixtral")


def ready(model: Any, device: str, dtype: torch.dtype = torch.float32) -> Any:
    model = model.eval().to(device, dtype)
    install(model, "auto", half=dtype != torch.float32)
    return model


def engine(model: Any, blocks: int = 64, held: torch.dtype | None = None, exact: bool = False) -> Engine:
    store = BlockStore(blocks, 4, held)
    facts = Facts(len(model.get_output_embeddings().weight), blocks * 4, ())
    runner = Runner(Decoder(model, exact=exact), store)
    return Engine(runner, Blocks(blocks, 4), Limits(32, 8), facts, Texts(make_tokenizer()), store.copy)


def prompts(count: int = 12) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 60, (1 + 5 * n % 31,), generator=draw).tolist() for n in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, device: str) -> None:
    """In fp32; where room is short too, so that some are computed again."""
    model = ready(tiny(family), device)
    model.generation_config.eos_token_id = None
    asked = [Request(str(n), tuple(own), Sampling(max_tokens=10)) for n, own in enumerate(prompts())]
    for blocks in (64, 14):
        told = answers(engine(model, blocks), asked)
        for one in asked if blocks == 64 else asked[:4]:
            ids = torch.tensor([one.prompt], device=device)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
            assert told[one.id] == [out[0, len(one.prompt) :].tolist()], (family, one.id)


@pytest.mark.parametrize("family", ["Llama", "Gemma-2", "Mistral"])
@pytest.mark.parametrize("held", [None, torch.int8], ids=["own", "int8"])
def test_logits_in_bf16_are_near_those_in_fp32(family: str, held: torch.dtype | None, gpu: str) -> None:
    plain, short = ready(tiny(family), gpu), ready(tiny(family), gpu, torch.bfloat16)
    asked = [Request(str(n), tuple(own), Sampling(max_tokens=1, logprobs=8)) for n, own in enumerate(prompts())]
    seen = []
    for model, how in ((plain, None), (short, held)):
        made, found = engine(model, held=how), {}
        for one in asked:
            made.add(one)
        while not made.idle:
            for event in made.step():
                found[event.request] = dict(event.tokens[0].top)
        seen.append(found)
    assert seen[0].keys() == seen[1].keys() == {one.id for one in asked}
    for id, top in seen[0].items():
        both = set(top) & set(seen[1][id])
        assert len(both) >= 4 and all(abs(top[t] - seen[1][id][t]) < 0.25 for t in both), (top, seen[1][id])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["Llama", "Gemma-2", "Mixtral"])
def test_exact_rows_do_not_depend_on_each_other(family: str, dtype: torch.dtype, device: str) -> None:
    """Random schedules, to the bit, as tests/inference/test_exact.py has them on the CPU."""
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("refused there")
    trial = Trial(ready(tiny(family), device, dtype), exact=True)
    assert trial.decoder.exact
    for seed in range(4):
        assert trial.check(seed, some(trial.words, 0, 6, 20, 8)).compared > 5


def test_without_exact_a_gpu_says_that_rows_depend_on_each_other(gpu: str) -> None:
    assert not Decoder(ready(tiny("Llama"), gpu)).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_exact_logits_are_those_of_the_model(dtype: torch.dtype, gpu: str) -> None:
    model = ready(tiny("Llama"), gpu, dtype)
    asked = Request("a", tuple(prompts()[3]), Sampling(max_tokens=1, logprobs=5))
    seen = []
    for exact in (False, True):
        made = engine(model, exact=exact)
        made.add(asked)
        seen.append(next(event for event in made.step() if event.tokens).tokens[0])
    close = 1e-4 if dtype == torch.float32 else 0.1
    assert seen[0].logprob == pytest.approx(seen[1].logprob, abs=close)


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@torch.no_grad()
def test_adapters_by_row_are_those_of_peft(exact: bool, device: str, tmp_path: Path) -> None:
    if exact and device == "cpu":
        pytest.skip("tests/models/test_loras.py has it")
    for name, rank in (("a", 4), ("b", 8)):
        torch.manual_seed(rank)
        get_peft_model(
            tiny("Llama"), LoraConfig(r=rank, init_lora_weights=False, target_modules="all-linear")
        ).save_pretrained(tmp_path / name)
    made = engine(ready(tiny("Llama"), device), exact=exact)
    bank = made.runner.forward.bank
    for name in "ab":
        bank.put(name, bank.read(tmp_path / name))
    own, at, spans, keys = prompts()[3:9], 0, [], ["a", "", "b", "a", "", "b"]
    for n, ids in enumerate(own):
        spans.append(Span(0, at, at + len(ids), 0, tuple(range(8 * n, 8 * n + 8))))
        at += len(ids)
    tokens = torch.tensor([t for ids in own for t in ids], device=device)
    places = torch.cat([torch.arange(len(ids)) for ids in own]).to(device)
    out = made.runner.forward.hidden(tokens, places, Paged(BlockStore(64, 4), tuple(spans)), keys)
    for span, ids, key in zip(spans, own, keys, strict=True):
        plain = tiny("Llama").eval()
        plain = PeftModel.from_pretrained(plain, tmp_path / key).eval().get_base_model() if key else plain
        alone = plain.to(device).base_model(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0]
        assert (out[span.start : span.end] - alone).norm() <= 1e-4 * alone.norm(), key


def test_weights_changed_in_place_are_those_that_answer_next(device: str) -> None:
    model = ready(tiny("Llama"), device)
    made, asked = engine(model), Request("a", tuple(prompts()[3]), Sampling(max_tokens=6))
    first = answers(made, [asked])["a"]
    noise = [torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) for n, p in enumerate(model.parameters())]

    def work() -> None:
        with torch.no_grad():
            for p, more in zip(model.parameters(), noise, strict=True):
                p.add_(more.to(p.device) * 0.2)

    made.update(work)
    second = answers(made, [replace(asked, id="b")])["b"]
    assert made.version == 1 and first != second
    assert answers(engine(model), [replace(asked, id="c")])["c"] == second


def waits(model: Any, device: str) -> int:
    """Times that a step of single tokens waits for the device."""
    made = engine(model)
    for n, own in enumerate(prompts(6)):
        made.add(Request(str(n), tuple(own), Sampling(max_tokens=30)))
    for _ in range(12):
        made.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            made.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_waits_as_often_for_two_layers_as_for_six(dtype: torch.dtype, gpu: str) -> None:
    few, more = (waits(ready(make_model(num_hidden_layers=n), gpu, dtype), gpu) for n in (2, 6))
    assert few == more <= 12


def test_the_cache_takes_its_share_of_a_gpu(gpu: str) -> None:
    model = ready(tiny("Llama"), gpu, torch.bfloat16)
    free, _ = torch.cuda.mem_get_info()
    before = torch.cuda.memory_allocated()
    store = store_of(Decoder(model), Cache(memory=0.01))
    taken = torch.cuda.memory_allocated() - before
    assert 0.007 * free < taken <= 0.012 * free and sum(store.bytes.values()) <= taken
    assert {held.keys.dtype for held in store.layers.values()} == {torch.bfloat16}


def test_a_model_by_its_folder_answers_scores_and_embeds(device: str, tiny: Path) -> None:
    generator = {"kind": "engine", "cache": {"size": 8 << 20}}
    with LLM(str(tiny), generator=generator, device=device) as llm, LLM(str(tiny), generator="transformers") as other:
        said = [[{"role": "user", "content": f"hello {n}"}] for n in range(5)]
        first = llm.generate(said, Sampling(max_tokens=8, temperature=1.0, seed=3))
        assert [one.token_ids for one in first] == [
            one.token_ids for one in llm.generate(said, Sampling(max_tokens=8, temperature=1.0, seed=3))
        ]
        greedy = [llm.chat(one, Sampling(max_tokens=4)).token_ids for one in said]
        assert greedy and len(other.generate(said, Sampling(max_tokens=4))) == 5
        scores = llm.score([("hello", " world"), "the lazy dog"])
        assert all(-20 < one.total < 0 for one in scores)
        vectors = llm.embed(["hello", "hello", "the lazy dog"])
        assert torch.allclose(vectors[0], vectors[1], atol=1e-3) and not torch.allclose(
            vectors[0], vectors[2], atol=1e-2
        )


def test_scores_in_bf16_are_near_those_in_fp32(gpu: str, tiny: Path) -> None:
    text, cache = "the quick brown fox jumps over the lazy dog", {"kind": "engine", "cache": {"size": 8 << 20}}
    totals = []
    for precision in ("fp32", "bf16", "bf16_mixed", "auto"):
        with LLM(str(tiny), generator=cache, precision=precision) as llm:
            totals.append(llm.score([text])[0].total)
    assert totals[1] == pytest.approx(totals[0], rel=0.02) and totals[2] == pytest.approx(totals[0], rel=0.02)
    assert totals[3] == totals[1]


def test_a_quantised_model_answers_and_is_refused_exactness(gpu: str, tiny: Path) -> None:
    pytest.importorskip("bitsandbytes")
    how: dict[str, Any] = {"kind": "engine", "cache": {"size": 8 << 20}}
    with LLM(str(tiny), generator=how, quant="bnb_nf4") as llm:
        assert llm.generate(["hello"], Sampling(max_tokens=4))[0].token_ids
    with (
        pytest.raises(ModelError, match="cannot be run exactly"),
        LLM(str(tiny), generator=how | {"exact": True}, quant="bnb_nf4") as llm,
    ):
        llm.generate(["hello"], Sampling(max_tokens=4))
