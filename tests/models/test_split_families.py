"""Whole models on parts of a row give what they give on the row, in fp64; rotations by a sequence's length too."""

import copy

import pytest
import torch

from llmkit.core.types import Batch, Packed, Segment
from llmkit.models.attend import install
from llmkit.models.compare import FLAT, Doubled, exact, off, packed_case
from llmkit.models.families import FAMILIES, tiny
from llmkit.models.rotary import tell_lengths
from llmkit.models.support import measured
from llmkit.parallel.context import split
from tests.models.test_rotary import CASES
from tests.models.test_split import everywhere, placed

FAST = ("Llama", "Gemma-3", "Gemma-2", "gpt-oss", "Mixtral", "DeepSeek-V3")


def whole():
    case = packed_case()
    tokens, positions = case.tokens[None], case.positions[None]
    return Batch(tokens, positions, tokens, torch.ones(tokens.shape), case.context, (0, 1, 2))


def run(model, batch, factors):
    trained = [p for p in model.parameters() if p.requires_grad]
    out = model(input_ids=batch.tokens, position_ids=batch.positions, attend=batch.attend).logits
    grads = torch.autograd.grad((out * factors).sum(), trained, allow_unused=True)
    return out.detach(), grads


def compared(model, count, method):
    """How far parts are from the row: logits, and the worst gradient."""
    install(model.eval(), "sdpa")  # the router of Phi-3.5-MoE draws in training
    batch = whole()
    ends = [s.end for s in batch.attend.segments]
    with Doubled():
        size = model(input_ids=batch.tokens, position_ids=batch.positions, attend=batch.attend).logits.shape[-1]
    torch.manual_seed(0)
    factors = torch.randn(1, batch.tokens.shape[1], size, dtype=torch.float64)
    factors[:, max(ends) :] = 0  # padding
    copies = [copy.deepcopy(model) for _ in range(count)]

    def work(exchange):
        part = split(batch, exchange, method)
        own = torch.nn.functional.pad(factors, (0, 0, 0, part.attend.tokens - factors.shape[1]))
        with Doubled():
            return part.attend, run(copies[exchange.index], part, part.attend.cut(own))

    with Doubled():
        logits, grads = run(model, batch, factors)
    found = everywhere(count, work)
    ours = placed([out for _, (out, _) in found], [one for one, _ in found], logits.shape[1], 1)
    least = FLAT * max(float(g.abs().max()) for g in grads if g is not None)
    gaps = []
    for want, *parts in zip(grads, *(taken for _, (_, taken) in found), strict=True):
        assert all((part is None) == (want is None) for part in parts)
        if want is not None:
            gaps.append(off(sum(parts), want, least))
    return off(ours[:, : max(ends)], logits[:, : max(ends)]), max(gaps)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize(
    "family",
    [
        family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
        if measured().get(family, {}).get("packed", "").startswith("yes")
    ],
)
def test_parts_equal_the_row(family, method):
    logits, gradients = compared(exact(tiny(family)), 2, method)
    assert logits < 1e-10 and gradients < 1e-10


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize(("family", "node"), CASES[::2], ids=lambda value: getattr(value, "kind", value))
def test_rotations_by_the_length_of_the_whole_sequence(family, node, method, scaled):
    model = exact(scaled(family, node))
    logits, gradients = compared(model, 4, method)
    assert logits < 1e-10 and gradients < 1e-10
    hooks = model.base_model._forward_pre_hooks
    del hooks[next(key for key, hook in hooks.items() if hook is tell_lengths)]  # the control: what a part shows
    logits, gradients = compared(model, 4, method)
    assert logits > 1e-3 and gradients > 1e-3


def kept(model, batch):
    """Bytes that a forward keeps for the backward pass, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(input_ids=batch.tokens, position_ids=batch.positions, attend=batch.attend).logits
    return sum(size for size, _ in seen.values()), out


def long(tokens):
    """One sequence in one row."""
    ids, context = torch.arange(tokens)[None] % 60 + 3, Packed((Segment(0, 0, tokens),))
    return Batch(ids, torch.arange(tokens)[None], ids, torch.ones(1, tokens), context, (0,))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_a_row_as_many_times_as_long_fits(method, count):
    """A rank keeps its part of the activations, and of a longer row what one process keeps of the short one."""
    model = tiny("Llama")
    install(model, "sdpa")
    copies = [copy.deepcopy(model) for _ in range(count)]

    def shared(batch):
        return [size for size, _ in everywhere(count, lambda e: kept(copies[e.index], split(batch, e, method)))]

    alone, longer = kept(model, long(512))[0], kept(model, long(512 * count))[0]
    assert longer > 0.9 * count * alone  # the control: one process keeps all of it
    assert all(0.9 < size * count / alone < 1.1 for size in shared(long(512)))
    assert all(0.9 < size / alone < 1.1 for size in shared(long(512 * count)))
