"""Contexts equal each sequence alone, without a mask of T x T, and without one the model is transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.core.errors import ModelError
from llmkit.core.types import Packed, Paged, Segment, Span, Tree
from llmkit.models.attend import NO_MASK, attention, install
from llmkit.models.compare import alone, contexted, off, packed_case, tree_case
from llmkit.models.families import tiny
from llmkit.models.paged import BlockStore

HARD = [
    "Llama",
    "Qwen3",
    "Gemma-2",
    "Gemma-3",
    "Mistral",
    "Phi-3",
    "gpt-oss",
    "Mixtral",
    "Qwen3-MoE",
    "DeepSeek-V3",
]
ALL = [*HARD, "Qwen2", "OLMo-2", "SmolLM3", "Granite", "Cohere-2"]


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return out


def compared(family: str, case: Any) -> tuple[float, float]:
    model = tiny(family, 0.05)
    logits, grads = alone(model, case)  # transformers' own attention: nothing is installed yet
    install(model, "auto")
    ours, our_grads = contexted(model, case)
    used = sorted({place for path in case.paths for place in path})
    assert grads.keys() == our_grads.keys()
    return off(ours[used], logits[used]), max(off(our_grads[name], grads[name]) for name in grads)


@pytest.mark.parametrize("family", ALL)
def test_packed_equals_unpacked_in_fp32(family: str) -> None:
    # DeepSeek-V3's products over experts round by their number of rows: 1.02e-6 on one machine, in its router alone
    assert max(compared(family, packed_case())) <= (1.2e-6 if family == "DeepSeek-V3" else 1e-6)


@pytest.mark.parametrize("family", HARD)
def test_tree_equals_its_paths_in_fp32(family: str) -> None:
    logits, grads = compared(family, tree_case())
    assert logits <= 1e-6
    # a prefix's gradients are summed in another order (test_support.py holds them to 1e-10 in fp64); Gemma-3's norms of
    # queries and keys make more of it: its paths alone differ by 3e-6 between transformers' own eager and sdpa
    assert grads <= (5e-6 if family == "Gemma-3" else 2e-6)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_rows_with_gaps_give_each_segment_its_own_values(kind: str) -> None:
    model = tiny("Gemma-3").eval()
    install(model, kind)
    tokens = torch.randint(3, 64, (2, 12))
    segments = (Segment(1, 7, 12), Segment(0, 2, 6), Segment(1, 0, 4))
    positions = torch.zeros_like(tokens)
    for s in segments:
        positions[s.row, s.start : s.end] = torch.arange(s.end - s.start)
    packed = model(input_ids=tokens, position_ids=positions, attend=Packed(segments)).logits
    for s in segments:
        assert off(packed[s.row, s.start : s.end], model(tokens[None, s.row, s.start : s.end]).logits[0]) <= 2e-6


def test_another_segment_changes_nothing() -> None:
    model = tiny("Llama").eval()
    install(model, "sdpa")
    case = packed_case()
    other = case.tokens.clone()
    other[:11] = (other[:11] + 7) % 64
    row = [
        model(input_ids=t[None], position_ids=case.positions[None], attend=case.context).logits[0]
        for t in (case.tokens, other)
    ]
    assert torch.equal(row[0][11:19], row[1][11:19])
    assert not torch.equal(row[0][:11], row[1][:11])


def largest(model: Any, length: int, each: int, **said: Any) -> int:
    tokens = torch.randint(3, 64, (1, length))
    positions = (torch.arange(length) % each)[None]
    with Largest() as seen:
        model.base_model(
            input_ids=tokens, position_ids=positions, use_cache=False, **said
        ).last_hidden_state.sum().backward()
    return seen.elements


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma-2", "gpt-oss"])
def test_packed_memory_is_linear_in_the_row(family: str) -> None:
    model = tiny(family)
    install(model, "sdpa")
    context = [Packed(tuple(Segment(0, at, at + 32) for at in range(0, length, 32))) for length in (512, 1024)]
    small, large = (largest(model, n, 32, attend=c) for n, c in zip((512, 1024), context, strict=True))
    assert large <= 2 * small < 1024 * 1024 / 4
    if family != "gpt-oss":  # control: transformers' own packing makes the mask of T x T
        assert largest(model, 1024, 32) >= 1024 * 1024


def test_a_window_bounds_the_masks_of_a_long_segment() -> None:
    model = tiny("Mistral")
    context = Packed((Segment(0, 0, 1024),))
    install(model, "sdpa")
    assert largest(model, 1024, 1024, attend=context) <= 128 * 1024
    install(model, "eager")
    assert largest(model, 1024, 1024, attend=context) >= 1024 * 1024  # control: the twin makes the dense mask


def test_no_context_is_transformers_own_sdpa() -> None:
    model, tokens = tiny("Llama").eval(), torch.randint(3, 64, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    own = [model(tokens).logits, model(tokens, attention_mask=mask).logits]
    assert install(model, "auto") in ("compiled", "sdpa")
    assert torch.equal(model(tokens).logits, own[0])
    assert torch.equal(model(tokens, attention_mask=mask).logits, own[1])


def test_kinds_without_masks_leave_padded_batches_to_sdpa() -> None:
    def unmasked(pieces: Any, rule: Any) -> list[Tensor]:
        return [torch.full_like(p.q, 7.0) for p in pieces]

    q, mask = torch.randn(2, 2, 3, 8), torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    padded, _ = attention(unmasked)(torch.nn.Module(), q, q, q, mask)
    plain = torch.nn.functional.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2)
    assert torch.equal(padded, plain)
    whole, _ = attention(unmasked)(torch.nn.Module(), q, q, q, None)
    assert (whole == 7).all()  # control: without a mask the kind itself runs


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Gemma-2", "gpt-oss"])
def test_generate_with_left_padding_is_as_before(family: str, kind: str) -> None:
    model = tiny(family).eval()
    tokens, mask = torch.randint(3, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    how = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True)
    own = model.generate(tokens, attention_mask=mask, **how)
    install(model, kind)
    ours = model.generate(tokens, attention_mask=mask, **how)
    assert torch.equal(ours.sequences, own.sequences)
    assert off(torch.stack(ours.scores), torch.stack(own.scores)) <= 5e-6


def test_contexts_pass_adapters_recompute_and_dropout() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny("Llama")
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    install(model, "sdpa")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        return contexted(wrapped, packed_case())

    kept, kept_grads = run()
    again, again_grads = run()
    assert torch.equal(kept, again)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    _, grads = run()
    assert grads.keys() == kept_grads.keys() == again_grads.keys()
    assert max(off(grads[name], kept_grads[name]) for name in grads) <= 1e-6
    wrapped.eval()
    assert off(run()[0], kept) > 1e-3  # control: dropout was on


def test_logits_to_keep_takes_places() -> None:
    model, case = tiny("Qwen3").eval(), packed_case()
    install(model, "sdpa")
    said = dict(input_ids=case.tokens[None], position_ids=case.positions[None], attend=case.context)
    places = torch.tensor([0, 11, 18])
    assert off(model(**said, logits_to_keep=places).logits, model(**said).logits[:, places]) <= 1e-6


@pytest.mark.parametrize("family", ["Llama", "Gemma-2", "gpt-oss", "DeepSeek-V3"])
def test_bf16(family: str) -> None:
    model, case = tiny(family).eval().bfloat16(), packed_case()
    logits = alone(model, case)[0][:19].float()
    install(model, "sdpa", half=True)
    ours = contexted(model, case)[0][:19]
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - logits).norm() <= 3e-2 * logits.norm()


def test_autocast_to_bf16() -> None:
    model, case = tiny("Llama").eval(), packed_case()
    install(model, "sdpa", half=True)
    exact = contexted(model, case)[0][:19]
    with torch.autocast("cpu", torch.bfloat16):
        half = contexted(model, case)[0][:19].float()
    assert 0 < (half - exact).norm() <= 3e-2 * exact.norm()


def refusal(**said: Any) -> str:
    model, case = tiny("Llama"), packed_case()
    install(model, "sdpa")
    given = dict(input_ids=case.tokens[None], position_ids=case.positions[None], attend=case.context)
    with pytest.raises(ValueError) as caught:
        model(**{**given, **said})
    return str(caught.value)


def test_what_a_context_excludes_is_refused() -> None:
    from transformers import DynamicCache

    assert "leave attention_mask out" in refusal(attention_mask=torch.ones(1, 20))
    assert "leave past_key_values out" in refusal(past_key_values=DynamicCache())
    assert "overlaps another" in refusal(attend=Packed((Segment(0, 0, 5), Segment(0, 4, 9))))
    assert "leaves the row" in refusal(attend=Packed((Segment(0, 15, 21),)))
    assert "not an earlier segment" in refusal(attend=Tree((Segment(0, 0, 5, 1), Segment(0, 5, 9))))
    assert "no_grad" in refusal(attend=Paged(BlockStore(8, 4), (Span(0, 0, 20, 0, (0, 1, 2, 3, 4)),)))


def test_the_marker_of_no_mask_is_welcome() -> None:
    model, case = tiny("Llama").eval(), packed_case()
    install(model, "sdpa")
    said = dict(input_ids=case.tokens[None], position_ids=case.positions[None], attend=case.context)
    assert torch.equal(model(**said, attention_mask=NO_MASK).logits, model(**said).logits)


def test_installing_twice_keeps_one_hook_and_the_last_kind() -> None:
    model = tiny("Llama")
    install(model, "sdpa")
    hooks = len(model.model._forward_pre_hooks)
    assert install(model, "eager") == "eager"
    assert len(model.model._forward_pre_hooks) == hooks
    assert model.config._attn_implementation == "llmkit_plain"


def test_kinds_that_are_missing_are_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    for kind in ("flash", "flex"):
        with pytest.raises(
            ModelError, match=rf"^model.attention: {kind} needs a CUDA device; fix: use attention: auto$"
        ):
            install(tiny("Llama"), kind)


def test_a_family_with_its_own_attention_takes_no_other() -> None:
    assert install(tiny("BLOOM"), "auto") == "own"
    with pytest.raises(ModelError, match="BloomForCausalLM brings its own attention"):
        install(tiny("BLOOM"), "sdpa")
