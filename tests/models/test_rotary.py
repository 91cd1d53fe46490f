"""Rotations that move with a sequence's length: packed and padded rows equal each sequence alone in a new model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.core.types import Packed, Segment
from llmkit.inference.generate import generate
from llmkit.inference.sampling import Sampling
from llmkit.models.attend import install
from llmkit.models.compare import Case, Doubled, contexted, exact, off, packed_case
from llmkit.models.lengths import sequence_lengths
from llmkit.models.rope import Dynamic, LongRope, RopeScaling
from llmkit.models.rotary import Turning, turns_by_sequence

DYNAMIC = Dynamic(factor=4, original_max_position_embeddings=5)
"""Of the packed case's sequences of 11, 1 and 7 tokens two are longer than the trained length."""
LONG = LongRope(
    factor=4,
    original_max_position_embeddings=8,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.5, 2.5, 4.0, 8.0],
)
"""One of the sequences is longer."""
CASES = [
    *((family, DYNAMIC) for family in ("Llama", "Gemma-3", "Cohere-2")),
    *((family, LONG) for family in ("Phi-3", "Qwen3", "Gemma-3", "gpt-oss")),
]


def alone(model: Any, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sequence in a copy of a model of transformers that has seen no other."""
    from llmkit.models.compare import _factors

    total: Any = None
    grads: dict[str, Tensor] = {}
    for path in case.paths:
        fresh, here = copy.deepcopy(model), list(path)
        out = fresh(input_ids=case.tokens[here][None], use_cache=False).logits[0]
        total = out.new_zeros(len(case.tokens), out.shape[1]) if total is None else total
        total[here] = out.detach()
        (out * _factors(len(case.tokens), out)[here]).sum().backward()
        for name, parameter in fresh.named_parameters():
            if parameter.grad is not None:
                grads[name] = grads.get(name, 0) + parameter.grad
    return total, grads


@pytest.mark.parametrize(("family", "node"), CASES, ids=lambda value: getattr(value, "kind", value))
def test_a_packed_row_equals_each_sequence_alone(family: str, node: RopeScaling, scaled: Any) -> None:
    model, case = exact(scaled(family, node)), packed_case()
    used = [place for path in case.paths for place in path]
    with Doubled():
        model.set_attn_implementation("eager")
        wanted, wanted_grads = alone(copy.deepcopy(model), case)
        ours = copy.deepcopy(model)
        install(ours, "sdpa")
        assert turns_by_sequence(ours)
        made, grads = contexted(ours, case)
        # the control: with the rotations of transformers the longest sequence turns them all
        install(model, "sdpa")
        for module in [m for m in model.modules() if isinstance(m, Turning)]:
            module.forward = _by_the_longest(module)
        wrong, _ = contexted(model, case)
    assert off(made[used], wanted[used]) < 1e-10
    assert grads.keys() == wanted_grads.keys()
    assert max(off(grads[name], wanted_grads[name]) for name in grads) < 1e-10
    assert off(wrong[used], wanted[used]) > 1e-3


def _by_the_longest(module: Turning) -> Any:
    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        return module.turned(x, position_ids, layer_type, int(position_ids.max()) + 1)

    return forward


@pytest.mark.parametrize("node", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_padded_rows_equal_each_row_alone(node: RopeScaling, scaled: Any) -> None:
    model = scaled("Qwen3", node)
    rows = [torch.arange(3, 3 + length) for length in (3, 11, 7)]
    model.set_attn_implementation("eager")
    wanted = [copy.deepcopy(model)(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    install(model, "sdpa")
    tokens = torch.stack([torch.nn.functional.pad(row, (0, 11 - len(row))) for row in rows])
    positions = torch.stack([torch.nn.functional.pad(torch.arange(len(row)), (0, 11 - len(row))) for row in rows])
    context = Packed(tuple(Segment(place, 0, len(row)) for place, row in enumerate(rows)))
    mask = torch.stack([torch.arange(11) < len(row) for row in rows])
    for made in (
        model(input_ids=tokens, position_ids=positions, attend=context).logits,
        model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits,
    ):
        for row, logits in zip(wanted, made, strict=True):
            assert off(logits[: len(row)], row) < 1e-5


def test_what_a_forward_leaves_behind_changes_no_later_one(scaled: Any) -> None:
    model = scaled("Llama", DYNAMIC)
    install(model, "sdpa")
    short = torch.arange(3, 10)[None]
    before = model(input_ids=short, use_cache=False).logits
    model(input_ids=torch.arange(3, 43)[None], use_cache=False)
    assert torch.equal(model(input_ids=short, use_cache=False).logits, before)


def test_lengths_are_those_of_runs() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 0], [0, 0, 1, 2, 3, 4, 5], [7, 8, 9, 0, 1, 2, 3]])
    assert sequence_lengths(positions).tolist() == [
        [3, 3, 3, 1, 2, 2, 1],
        [1, 6, 6, 6, 6, 6, 6],
        [10, 10, 10, 4, 4, 4, 4],
    ]


class Words:
    """A tokenizer that generation asks for no more than this."""

    eos_token_id = None
    pad_token_id = 0

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("node", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_generation_across_the_trained_length_equals_whole_forwards(node: RopeScaling, scaled: Any) -> None:
    model = scaled("Qwen3", node).eval()
    model.generation_config.eos_token_id = None
    install(model, "sdpa")
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12], [13]]
    made = generate(model, Words(), prompts, Sampling(max_tokens=6))
    for prompt, completion in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert list(completion.token_ids) == tokens[len(prompt) :]


def test_keys_are_kept_only_while_rotations_stay(scaled: Any) -> None:
    steady = {}
    for node in (DYNAMIC, LONG):
        model = scaled("Qwen3", node)
        install(model, "sdpa")
        module = next(m for m in model.modules() if isinstance(m, Turning))
        steady[node.kind] = [module.steady(*ends) for ends in ((1, 5), (5, 9), (9, 9), (9, 12))]
    assert steady == {"dynamic": [True, False, True, False], "longrope": [True, False, True, True]}
