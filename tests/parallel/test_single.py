"""The stepper's state: taken back, it goes on as if it had never stopped, on every device and with every optimizer."""

import pytest
import torch
from torch import nn

from llmkit.parallel.single import Single
from llmkit.train.optim import AdamW, AdamW8bit

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def stepper(node, device):
    torch.manual_seed(0)
    layer = nn.Linear(64, 80).to(device)  # 8-bit moments begin at 4,096 values
    params = dict(layer.named_parameters())
    return Single(layer, params, node.build(params))


def stepped(steps, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in steps.params.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        steps.step(1.0, 1.0, steps.grad_norm())
    return steps


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("node", [AdamW(lr=1e-2), AdamW8bit(lr=1e-2)], ids=lambda node: node.kind)
def test_a_state_that_was_saved_goes_on_to_the_same_weights(node, device):
    whole = stepped(stepper(node, device), range(6))
    half = stepped(stepper(node, device), range(3))
    saved = {name: value.to("cpu", copy=True) for name, value in half.state().items()}  # as a checkpoint holds it
    other = stepper(node, device)
    other.load(saved)
    stepped(other, range(3, 6))
    assert not torch.equal(half.params["weight"], whole.params["weight"])  # the control
    for name, value in whole.state().items():
        assert torch.equal(other.state()[name], value), name


@pytest.mark.parametrize(("settings", "device"), [({"capturable": True}, "meta"), ({}, "cpu")])
def test_the_count_of_steps_lies_where_the_optimizer_reads_it(settings, device):
    layer = nn.Linear(2, 2, device="meta")
    params = dict(layer.named_parameters())
    steps = Single(layer, params, torch.optim.AdamW(params.values(), **settings))
    held = {f"param/{name}": torch.zeros(p.shape) for name, p in params.items()}
    steps.load(held | {f"optim/{name}/step": torch.tensor(3.0) for name in params})
    assert {steps.optimizer.state[p]["step"].device.type for p in params.values()} == {device}
