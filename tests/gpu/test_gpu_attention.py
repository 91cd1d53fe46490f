"""Kinds of attention against their plain twin on odd packed shapes, and steps of the engine over blocks."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.core.types import Packed, Paged, Segment, Span
from llmkit.models.attend import KINDS, attention, install
from llmkit.models.families import tiny
from llmkit.models.paged import BlockStore
from llmkit.models.pieces import Piece, Rule, eager

LENGTHS = (1, 7, 129, 64, 3, 200)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {FP32: 2e-5, BF16: 2e-2, FP16: 4e-3}


def pieces(device: str, dtype: torch.dtype, size: int = 24) -> list[Piece]:
    """Segments of one row, of six heads over two, with gradients."""
    draw, made = torch.Generator().manual_seed(0), []
    for n in LENGTHS:
        parts = [torch.randn(1, heads, n, size, generator=draw) for heads in (6, 2, 2)]
        made.append(Piece(*(part.to(device, dtype).requires_grad_() for part in parts), 0))
    return made


def results(kind: Any, given: list[Piece], rule: Rule) -> list[Tensor]:
    """Values, then gradients, all in fp32."""
    outs = kind(given, rule)
    weights = [torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape) for out in outs]
    total = sum((out.float() * weight).sum() for out, weight in zip(outs, weights, strict=True))
    grads = torch.autograd.grad(total, [part for one in given for part in (one.q, one.k, one.v)])
    return [part.float().detach() for part in (*outs, *grads)]


def near(ours: list[Tensor], plain: list[Tensor], close: float) -> None:
    for a, b in zip(ours, plain, strict=True):
        size = max(float(b.norm()), 1e-2 * b.numel() ** 0.5)  # what one key alone gives has no gradient
        assert a.isfinite().all() and float((a - b).norm()) <= close * size, float((a - b).norm()) / size


@pytest.mark.parametrize("rule", [Rule(0.2), Rule(0.2, window=5)], ids=["causal", "window"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("sdpa", FP32), ("sdpa", BF16), ("flash", FP32), ("flash", BF16), ("flash", FP16), ("flex", FP32), ("flex", BF16)],
    ids=lambda said: str(said).removeprefix("torch."),
)
def test_values_and_gradients_are_those_of_the_plain_twin(
    kind: str, dtype: torch.dtype, rule: Rule, device: str
) -> None:
    if device == "cpu" and (kind == "flex" or (kind == "flash" and dtype != FP32)):
        pytest.skip("of CUDA devices alone")
    torch.compiler.reset()
    given = pieces(device, dtype)
    wide = [Piece(*(part.detach().float().requires_grad_() for part in (p.q, p.k, p.v)), 0) for p in given]
    near(results(KINDS[kind], given, rule), results(eager, wide, rule), CLOSE[dtype])


@pytest.mark.parametrize("lengths", [LENGTHS, (5, 3)], ids=["long", "short"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("flash", BF16), ("flash", FP16), ("flex", FP32), ("flex", BF16)], ids=lambda said: str(said)
)
def test_a_packed_row_in_one_call(kind: str, dtype: torch.dtype, lengths: tuple[int, ...], gpu: str) -> None:
    """Values and gradients of a whole row (1, H, T, D); flex has no kernel for few queries of 16 numbers."""
    torch.compiler.reset()
    draw, ends = torch.Generator().manual_seed(0), list(accumulate(lengths))
    wide = [torch.randn(1, heads, ends[-1], 16, generator=draw).to(gpu, dtype).float() for heads in (4, 2, 2)]
    own, true = ([t.to(kind).requires_grad_() for t in wide] for kind in (dtype, FP32))
    attend = Packed(tuple(Segment(0, a, b) for a, b in zip([0, *ends], ends, strict=False)))
    outs = [
        attention(KINDS[name])(None, *row, scaling=0.2, attend=attend)[0]
        for name, row in ((kind, own), ("eager", true))
    ]
    ours, plain = (
        [out.float().detach(), *(g.float() for g in torch.autograd.grad(out.float().sin().sum(), row))]
        for out, row in zip(outs, (own, true), strict=True)
    )
    near(ours, plain, CLOSE[dtype])


def test_flash_under_autocast_takes_what_rotations_left_in_fp32(gpu: str) -> None:
    given = pieces(gpu, FP32)
    with torch.autocast("cuda", torch.bfloat16):
        ours = results(KINDS["flash"], given, Rule(0.2))
    near(ours, results(eager, pieces(gpu, FP32), Rule(0.2)), 2e-2)


def no_flips(family: str, dtype: torch.dtype) -> None:
    if family == "gpt-oss" and dtype != FP32:
        pytest.skip("in 16 bits its router sends some tokens to other experts")


@pytest.mark.parametrize("family", ["Llama", "Gemma-2", "Mistral", "gpt-oss", "Qwen3"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_a_packed_row_of_a_model_is_its_sequences_alone(family: str, dtype: torch.dtype, device: str) -> None:
    no_flips(family, dtype)
    model = tiny(family).eval().to(device, dtype)
    install(model, "auto", half=dtype != FP32)
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1)).to(device)
    cut = [(0, 9), (9, 10), (10, 27), (27, 40)]
    places = torch.cat([torch.arange(b - a) for a, b in cut])[None].to(device)
    attend = Packed(tuple(Segment(0, a, b) for a, b in cut))
    packed = model.base_model(input_ids=ids, position_ids=places, attend=attend).last_hidden_state[0]
    plain = tiny(family).eval().to(device)
    for start, end in cut:
        alone = plain.base_model(input_ids=ids[:, start:end], use_cache=False).last_hidden_state[0]
        assert (packed[start:end].float() - alone).norm() <= 3 * CLOSE[dtype] * alone.norm()


@pytest.mark.parametrize("family", ["Llama", "Gemma-2", "Mistral", "gpt-oss"])
@pytest.mark.parametrize(
    ("dtype", "held"), [(FP32, None), (BF16, None), (FP32, torch.int8), (BF16, torch.int8)], ids=str
)
@torch.no_grad()
def test_steps_over_blocks_are_one_forward(
    family: str, dtype: torch.dtype, held: torch.dtype | None, device: str
) -> None:
    """Two sequences, whose prompts are read in parts beside each other's tokens: mixed steps and single ones."""
    no_flips(family, dtype)
    model = tiny(family).eval().to(device, dtype)
    install(model, "auto", half=dtype != FP32)
    store, ids = BlockStore(16, 4, held), torch.randint(3, 60, (2, 21), generator=torch.Generator().manual_seed(2))
    blocks, made = (tuple(range(6)), tuple(range(6, 12))), ([], [])
    for parts in (((0, 6), None), ((6, 7), (0, 11)), ((7, 8), (11, 12)), ((8, 20), (12, 13)), ((20, 21), (13, 21))):
        spans, tokens, places, at = [], [], [], 0
        for one, part in enumerate(parts):
            if part is not None:
                start, end = part
                spans.append(Span(0, at, at + end - start, start, blocks[one]))
                tokens.append(ids[one, start:end])
                places.append(torch.arange(start, end))
                at += end - start
        there = {"input_ids": torch.cat(tokens)[None].to(device), "position_ids": torch.cat(places)[None].to(device)}
        out = model.base_model(**there, attend=Paged(store, tuple(spans))).last_hidden_state[0]
        for one, span in zip((n for n, part in enumerate(parts) if part is not None), spans, strict=True):
            made[one].append(out[span.start : span.end])
    plain = tiny(family).eval().to(device)
    whole = plain.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
    close = max(3 * CLOSE[dtype], 5e-2 if held else 0)
    for own, expected in zip(made, whole, strict=True):
        assert (torch.cat(own).float() - expected).norm() <= close * expected.norm()
