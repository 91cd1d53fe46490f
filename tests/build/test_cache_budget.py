"""A cache of the size that was asked for, whatever a family keeps."""

from __future__ import annotations

import pytest
import torch

from llmkit.build.cache import Caches, measured, store_of
from llmkit.core.errors import ResourceError
from llmkit.core.types import Paged, Span
from llmkit.inference.cache import ON_CPU, Cache
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny

KEPT = {"Llama": 2, "Gemma-3n": 2, "Gemma-4": 2, "DeepSeek-V3": 2, "GPT-2": 2, "gpt-oss": 2}
"""Layers with keys of their own: the upper half of a Gemma has none."""


@pytest.mark.parametrize("family", KEPT)
def test_the_budget_is_used_and_what_is_cached_is_read(family: str) -> None:
    model = tiny(family).eval()
    install(model, "auto")
    said: list[str] = []
    store = store_of(Decoder(model), Cache(size=200_000, block=4), said.append)
    assert len(store.layers) == KEPT[family]
    taken = sum(store.bytes.values())
    assert 200_000 - taken // store.blocks <= taken <= 200_000
    assert f"{store.blocks} blocks of 4" in said[0]
    tokens = torch.randint(3, 60, (11,), generator=torch.Generator().manual_seed(1))
    blocks, parts = (store.blocks - 1, 3, 7), []
    with torch.no_grad():
        for start, end in ((0, 6), (6, 10), (10, 11)):
            context = Paged(store, (Span(0, 0, end - start, start, blocks),))
            parts.append(Decoder(model).hidden(tokens[start:end], torch.arange(start, end), context, [""]))
        model.set_attn_implementation("eager")
        alone = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    assert (torch.cat(parts) - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_narrow_caches_have_more_blocks() -> None:
    model = tiny("Llama").eval()
    install(model, "auto")
    count = {
        kind: store_of(Decoder(model), Cache(size=200_000, precision=kind)).blocks for kind in ("auto", "bf16", "int8")
    }
    assert count["bf16"] in (2 * count["auto"], 2 * count["auto"] + 1) and count["int8"] > count["bf16"]


def test_a_budget_too_small_for_a_block_says_so() -> None:
    model = tiny("Llama").eval()
    install(model, "auto")
    with pytest.raises(ResourceError, match=r"a block of 16 tokens takes 0\.01 MiB and there are 0\.00"):
        store_of(Decoder(model), Cache(size=1000))


def test_the_share_is_of_what_is_free() -> None:
    assert Cache().budget("cuda", 1000) == 900
    assert Cache().budget("cpu", 2 << 40) == ON_CPU
    assert Cache(memory=0.5).budget("cpu", 4 << 20) == 1 << 20
    assert Cache(size=5).budget("cuda", 1) == 5


@pytest.mark.parametrize("size", [200_000, None])
def test_a_model_and_what_drafts_for_it_share_one_budget(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hold as many tokens, and together no more than was given."""
    models = [tiny("Llama").eval(), tiny("GPT-2").eval()]
    for model in models:
        install(model, "auto")
    monkeypatch.setattr("llmkit.build.cache.free", lambda device: 800_000)
    cache, said = Cache(size=size, block=4), list[str]()
    caches = Caches(measured(Decoder(models[0]), cache), cache, said.append)
    own = caches.beside(Decoder(models[1]))
    caches.settle()
    assert own.blocks == caches.store.blocks
    taken, budget = sum(sum(store.bytes.values()) for store in (own, caches.store)), size or 360_000
    assert budget - taken // own.blocks <= taken <= budget
    assert [line.split(":")[0] for line in said] == ["cache", "drafter's cache"]


def test_a_cache_that_has_its_size_makes_room_before_a_drafter_is_loaded() -> None:
    model = tiny("Llama").eval()
    install(model, "auto")
    decoder, cache = Decoder(model), Cache(size=200_000, block=4)
    store = store_of(decoder, cache)
    whole = store.blocks
    caches = Caches(store, cache, most=4 * whole)
    caches.settle()
    assert store.blocks == whole, "nothing drafts beside it"
    caches.clear()
    assert store.blocks == 1
    assert caches.beside(decoder).blocks == store.blocks == whole // 2
