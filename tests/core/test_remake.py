"""Activations made again: the same gradients, less kept, and no trust in what was changed in place."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmkit.adapters.node import Lora
from llmkit.core import remake
from llmkit.core.recast import recast
from llmkit.models import fused
from llmkit.models.fused import fuse

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)


def kept(model, ids):
    """(elements of distinct storages that a forward keeps, gradients)."""
    seen = {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(input_ids=ids, use_cache=False).logits.square().mean()
    loss.backward()
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sum(size for at, size in seen.items() if at not in owned) // 4, grads


@pytest.mark.parametrize("adapted", [False, True])
def test_less_is_kept_and_the_gradients_are_the_same_bits(adapted, monkeypatch):
    def model():
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**SIZES))
        fuse(made)
        return Lora(rank=2).attach(made) if adapted else made

    ids = torch.arange(40)[None] % 50
    few, ours = kept(model(), ids)
    monkeypatch.setattr(fused, "remakable", lambda made, *_: made)
    many, theirs = kept(model(), ids)
    # 2 layers keep neither 2 norms of 32 nor a product of 48 for each of 40 tokens; a frozen embedding is kept for one
    assert many - few >= 40 * (3 * 32 + 2 * 48)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_changed_in_place_is_kept_as_it_is():
    layer = recast(nn.Linear(4, 3), fused.FusedLinear)
    x, twin = torch.randn(5, 4), torch.nn.Linear(4, 3)
    twin.load_state_dict(layer.state_dict())
    made = remake.remakable(x * 2, lambda s: s * 2, x)
    made.mul_(3)
    layer(made).sum().backward()
    twin(x * 6).sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


def test_a_source_that_changes_before_the_backward_is_an_error():
    layer = recast(nn.Linear(4, 3), fused.FusedLinear)
    x = torch.randn(5, 4)
    out = layer(remake.remakable(x * 2, lambda s: s * 2, x))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
