"""fp8: which linears are taken, with a stand-in for torchao and, where it is installed, with its own emulation."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmkit.build import float8
from llmkit.core.errors import ModelError
from llmkit.models.fused import fuse
from tests.conftest import make_model


@pytest.fixture
def standin(monkeypatch):
    """A torchao that marks what it is given in the place of converting it."""
    taken = {}

    def convert_to_float8_training(model, *, module_filter_fn, config):
        taken.update({n: m for n, m in model.named_modules() if module_filter_fn(m, n)}, config=config)

    made = SimpleNamespace(convert_to_float8_training=convert_to_float8_training, Float8LinearConfig=dict)
    monkeypatch.setattr(float8, "library", lambda: made)
    return taken


def test_linears_of_layers_are_taken_and_the_head_is_not(standin):
    model = make_model()
    fuse(model)
    assert float8.convert(model) == 14 and standin.pop("config") == {"pad_inner_dim": True}
    assert len(standin) == 14 and all(".layers." in name for name in standin)
    assert all(isinstance(module, nn.Linear) for module in standin.values())


def test_sides_that_are_no_multiples_of_16_stay_and_a_model_of_those_alone_is_refused(standin):
    assert float8.convert(make_model(intermediate_size=40)) == 8  # q, k, v, o of two layers
    with pytest.raises(ModelError, match="precision: fp8 needs linears whose sides are multiples of 16"):
        float8.convert(make_model(hidden_size=24, intermediate_size=40))


def test_a_capable_device_is_taken(standin):
    float8.check("cuda", (8, 9))
    float8.check("cuda", (9, 0))


def test_torchaos_own_emulation_keeps_names_and_stays_near():
    library = pytest.importorskip("torchao.float8")
    model = make_model()
    fuse(model)
    ids, names = torch.arange(3, 36)[None], [name for name, _ in model.named_parameters()]  # 33 tokens
    plain = model(input_ids=ids).logits
    assert float8.convert(model, library.Float8LinearConfig(emulate=True, pad_inner_dim=True)) == 14
    assert names == [name for name, _ in model.named_parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gap = float((out.logits.float() - plain).abs().max())
    assert 0 < gap <= 0.1 * float(plain.abs().max())
    assert all(p.grad is not None for p in model.parameters())
