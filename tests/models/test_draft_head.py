"""A draft head: packed and cached rows are the same, however cut; its folder gives it back, or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.core.errors import ModelError
from llmkit.core.types import Packed, Paged, Segment, Span
from llmkit.models.draft_files import load_head, save_head
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.drafts import Target
from llmkit.models.families import tiny
from llmkit.models.paged import BlockStore
from tests.conftest import make_model

TARGET = Target("m", "abc", "def", "ghi")


def head_of(model: Any, words: int = 100, seed: int = 0) -> DraftHead:
    torch.manual_seed(seed)
    return DraftHead(shape_for(model, words), model.get_input_embeddings()).eval()


def rows(length: int, width: int, words: int = 448, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, words, (length,), generator=made)
    return tokens, torch.randn(length, width, generator=made), torch.arange(length)


@pytest.mark.parametrize("size", [8, 16])  # of heads: the compiled kernels take the larger one alone
@torch.no_grad()
def test_rows_over_a_cache_are_those_of_a_packed_text(size: int) -> None:
    head = head_of(make_model(hidden_size=64, head_dim=size))
    tokens, features, positions = rows(20, 64)
    whole = head(tokens, features, positions, Packed((Segment(0, 0, 20),)))
    store, past, parts = BlockStore(4, 8), 0, list[torch.Tensor]()
    for count in (7, 1, 1, 11):
        here = slice(past, past + count)
        span = Span(0, 0, count, past, (2, 0, 3))
        parts.append(head(tokens[here], features[here], positions[here], Paged(store, (span,))))
        past += count
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert not torch.allclose(whole[1:], head(tokens[1:], features[1:], positions[1:], Packed((Segment(0, 0, 19),))))


@torch.no_grad()
def test_texts_packed_in_one_row_see_themselves_alone() -> None:
    head = head_of(make_model())
    tokens, features, positions = rows(12, 32)
    apart = [
        head(tokens[a:b], features[a:b], positions[: b - a], Packed((Segment(0, 0, b - a),)))
        for a, b in ((0, 5), (5, 12))
    ]
    places = torch.cat([positions[:5], positions[:7]])
    together = head(tokens, features, places, Packed((Segment(0, 0, 5), Segment(0, 5, 12))))
    assert torch.allclose(together, torch.cat(apart), atol=1e-6)


@torch.no_grad()
def test_a_tree_of_drafts_has_the_rows_of_its_chains() -> None:
    head = head_of(make_model(hidden_size=64, head_dim=16))
    tokens, features, _ = rows(6, 64)
    parents = (-1, 0, 0, 1, 2)
    store = BlockStore(4, 8)
    head(tokens[:1], features[:1], torch.tensor([0]), Paged(store, (Span(0, 0, 1, 0, (0,)),)))
    depths = torch.tensor([1, 2, 2, 3, 3])
    tree = head(tokens[1:], features[1:], depths, Paged(store, (Span(0, 0, 5, 1, (0,), parents),)))
    for path in ((0, 1, 3), (0, 2, 4)):
        chain = torch.tensor([0, *(1 + node for node in path)])
        alone = head(tokens[chain], features[chain], torch.arange(4), Packed((Segment(0, 0, 4),)))
        assert torch.allclose(alone[1:], tree[list(path)], atol=1e-5)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma-3n", "Gemma-4", "DeepSeek-V3", "GPT-2", "OPT"])
@torch.no_grad()
def test_families_of_odd_sizes_have_a_head(family: str) -> None:
    model = tiny(family)
    shape = shape_for(model, 16)
    head = DraftHead(shape, model.get_input_embeddings())
    states = [torch.randn(3, shape.width) for _ in head.taps]
    hidden = head(torch.tensor([3, 4, 5]), head.features(states), torch.arange(3), Packed((Segment(0, 0, 3),)))
    assert head.logits(hidden).shape == (3, 16)


def test_a_folder_gives_the_head_back(tmp_path: Path) -> None:
    model = make_model()
    head = head_of(model)
    head.ids.copy_(torch.randperm(448)[:100])
    save_head(head, tmp_path / "head", TARGET)
    found = load_head(tmp_path / "head", model.get_input_embeddings())
    assert found.shape == head.shape
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), head.state_dict().values(), strict=True))
    assert json.loads((tmp_path / "head" / "draft.json").read_text())["target"]["files"] == "abc"
    assert not any("embed.weight" in name for name in found.state_dict())


def test_a_folder_that_holds_no_such_head_is_refused(tmp_path: Path) -> None:
    model = make_model()
    save_head(head_of(model), tmp_path, TARGET)
    said = json.loads((tmp_path / "draft.json").read_text())
    for change, word in (
        ({"version": 2}, "version 2"),
        ({"kind": "ngram"}, "ngram"),
        ({"settings": {**said["settings"], "inner": 49}}, "not those of one head"),
        ({"settings": {**said["settings"], "odd": 1}}, "not those of one head"),
        ({"settings": {**said["settings"], "words": 10**9}}, r"ids is \[100\], and draft.json asks for \[1000000000\]"),
        ({"settings": {**said["settings"], "words": 10**30}}, "draft.json says words: 1000"),
        ({"settings": {**said["settings"], "taps": ["a"]}}, "draft.json says taps.0: 'a'"),
        ({"settings": {**said["settings"], "theta": "a"}}, "draft.json says theta: 'a'"),
    ):
        (tmp_path / "draft.json").write_text(json.dumps(said | change))
        with pytest.raises(ModelError, match=word):
            load_head(tmp_path, model.get_input_embeddings())
    (tmp_path / "draft.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="words up to"):
        load_head(tmp_path, make_model(vocab_size=50).get_input_embeddings())
    whole = (tmp_path / "model.safetensors").read_bytes()
    for raw in (b"", b"{}", whole[:-9]):
        (tmp_path / "model.safetensors").write_bytes(raw)
        with pytest.raises(ModelError, match=r"speculation\.path: .*; fix: run kind: draft again"):
            load_head(tmp_path, model.get_input_embeddings())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"speculation\.path: .* no model.safetensors; fix: run kind: draft again"):
        load_head(tmp_path, model.get_input_embeddings())
    with pytest.raises(ModelError, match="cannot be read|no such|not there|draft.json"):
        load_head(tmp_path / "none", model.get_input_embeddings())
