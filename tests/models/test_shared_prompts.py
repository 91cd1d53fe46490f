"""A prompt that is computed once for its completions has the gradients of one prompt each."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from llmkit.adapters.node import Lora
from llmkit.core.types import Needs
from llmkit.data.batches import micro_batches
from llmkit.data.groups import Groups
from llmkit.data.node import FirstFit, NoPacking
from llmkit.models import heads
from llmkit.models.attend import install
from llmkit.models.compare import FLAT, Doubled, exact, off
from llmkit.models.families import tiny
from llmkit.models.heads import Scored
from llmkit.models.logps import plain_logps

HARD = ["Llama", "Gemma-2", "Gemma-3", "Mistral"]
MORE = ["Qwen3", "Phi-3", "gpt-oss", "Mixtral", "Qwen2", "OLMo-2", "Granite", "Cohere-2"]
FP64, FP32 = 1e-10, 1e-5


def drawn(count, groups, seed=0, most=9):
    """Groups of `count` completions of ragged lengths, with prompts of 1 to 12 tokens."""
    dice = np.random.default_rng(seed)
    sizes = [(1 if not at else int(dice.integers(2, 13)), dice.integers(1, most, count)) for at in range(groups)]
    flat = [n for prompt, rest in sizes for n in (prompt, *rest)]
    edges = np.cumsum([0, *flat])
    heads = np.arange(groups + 1) * (count + 1)
    ids = dice.integers(3, 60, edges[-1]).astype(np.int32)
    weights = np.ones(len(ids), np.float32)
    for head in heads[:-1]:
        weights[edges[head] : edges[head + 1]] = 0
    weights[int(edges[2]) - 1] = 0.0 if sizes[0][1][0] > 1 else 1.0  # a token of a completion that is not trained
    return Groups(
        ids=ids,
        weights=weights,
        starts=edges[heads],
        rows=(),
        forks=np.delete(edges, heads),
        firsts=np.arange(groups + 1) * count,
    )


def laid(groups, trees, packing=FirstFit()):
    rows = range(len(groups))
    return micro_batches(groups, rows, packing, 4096, 64, True, "cpu", trees=trees)


def logps(scored, batch, dtype):
    """The head's, or in fp64 its plain twin's."""
    if dtype != torch.float64:
        return scored(batch, Needs(by_weight=False))
    chosen, head = batch.weights != 0, scored.causal[0].get_output_embeddings()
    return plain_logps(scored.hidden(batch)[chosen], head.weight, head.bias, batch.labels[chosen], scored.shape)


def gradients(scored, batches, dtype):
    """Of a loss over each completion's sum, so that what one token counts depends on all others."""
    scored.zero_grad()
    factors = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for batch in batches:
        each, branches = logps(scored, batch, dtype), batch.branches
        sums = each.new_zeros(len(branches.group)).index_add(0, branches.of, each)
        (-logsigmoid(sums * 0.1) * factors[: len(sums)].to(sums)).sum().backward()
    return {name: p.grad.clone() for name, p in scored.named_parameters() if p.grad is not None}


def scored(family, dtype, adapter=False, recompute=0):
    model = exact(tiny(family, 0.05)) if dtype == torch.float64 else tiny(family, 0.05)
    install(model, "auto")
    base = model
    if adapter:
        torch.manual_seed(3)
        model = Lora(rank=4).attach(model).to(dtype)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    if recompute:
        again = {} if dtype != torch.float64 else {"context_fn": lambda: (nullcontext(), Doubled())}
        base.activation_checkpointing_enable({"use_reentrant": False, **again}, every_n_layers=recompute)
    # the routers of some mixtures draw in training
    return Scored(model.train() if recompute else model.eval())


def differs(family, groups, dtype, packing=FirstFit(), **more):
    made = scored(family, dtype, **more)
    ours = gradients(made, laid(groups, True), dtype)
    plain = gradients(made, laid(groups, False, packing), dtype)
    assert ours.keys() == plain.keys() and len(ours) > 4
    least = FLAT * max(float(grad.abs().max()) for grad in plain.values())
    return max(off(ours[name], plain[name], least) for name in plain)


@pytest.mark.parametrize("family", HARD)
def test_gradients_are_those_of_a_prompt_each(family):
    groups = drawn(2, 3)
    with Doubled():
        assert differs(family, groups, torch.float64) <= FP64
    assert differs(family, groups, torch.float32) <= FP32


@pytest.mark.parametrize("recompute", [0, 1, 2], ids=["none", "full", "selective"])
def test_with_lora_and_recompute(recompute):
    groups = drawn(4, 2)
    with Doubled():
        assert differs("Llama", groups, torch.float64, adapter=True, recompute=recompute) <= FP64
    assert differs("Llama", groups, torch.float32, adapter=True, recompute=recompute) <= FP32


@pytest.mark.parametrize("shared", [True, False], ids=["tree", "packed"])
@pytest.mark.parametrize("family", HARD)
def test_tokens_that_fill_a_row_up_for_faster_products_change_nothing(monkeypatch, family, shared):
    seen, groups = [], drawn(2, 3)
    for dtype, close in ((torch.float64, FP64), (torch.float32, FP32)):
        made = scored(family, dtype)
        decoder = made.causal[0].base_model
        decoder.register_forward_pre_hook(
            lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        batches = laid(groups, shared)
        with Doubled() if dtype == torch.float64 else nullcontext():
            plain = gradients(made, batches, dtype)
            monkeypatch.setattr(heads, "lacking", lambda rows: -len(rows) % 64 + 64)
            filled = gradients(made, batches, dtype)
            monkeypatch.undo()
        assert len(batches) == 1 and seen[1] % 64 == 0 and 64 <= seen[1] - seen[0] < 128
        seen.clear()
        least = FLAT * max(float(grad.abs().max()) for grad in plain.values())
        assert max(off(filled[name], plain[name], least) for name in plain) <= close


@pytest.mark.slow
@pytest.mark.parametrize("family", [*HARD, *MORE])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_every_family_and_group(family, count):
    for seed in range(3):
        groups = drawn(count, 4, seed)
        for more in ({}, {"adapter": True, "recompute": 1}, {"packing": NoPacking()}):
            with Doubled():
                assert differs(family, groups, torch.float64, **more) <= FP64
            assert differs(family, groups, torch.float32, **more) <= FP32
