"""fp16's factor: halved by an overflow, doubled after many steps without; and the steps that it guards."""

import math

import pytest
import torch
from torch import nn

from llmkit.core.errors import ResourceError
from llmkit.core.types import LossSum
from llmkit.parallel import scaler as module
from llmkit.parallel.scaler import Scaler
from llmkit.parallel.steps import Steps, Ways


def test_its_course_is_that_of_torchs_own(monkeypatch):
    monkeypatch.setattr(module, "GROWTH_STEPS", 3)
    ours, theirs = Scaler(), torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for bad in (0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0):
        theirs.scale(torch.ones(()))
        p.grad = torch.full((2,), math.inf if bad else 1.0)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.halve() if bad else ours.fine()
        assert ours.scale == theirs.get_scale()


def test_a_streak_down_to_one_stops_with_the_lever():
    scaler = Scaler(2.0)
    scaler.halve()
    with pytest.raises(ResourceError, match="precision: gradients overflow in fp16.*set precision=bf16_mixed or fp32"):
        scaler.halve()


class Wide(nn.Module):
    """Multiplies in fp16 with a gradient that overflows when the loss's factor is large."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, batch):
        return (batch @ self.weight).float()


def test_an_overflow_is_seen_in_the_norm_and_scaled_gradients_are_exact():
    model = Wide()
    params = dict(model.named_parameters())
    steps = Steps(model, params, torch.optim.SGD(params.values(), lr=1.0), Ways(torch.float16, Scaler(2.0**15)))

    def loss(scores, batch):
        return LossSum(scores.sum() * 16, torch.ones(()), {})

    sums = steps.accumulate([torch.ones(1, 4)], loss, 1.0)  # 2^15 * 16 is above fp16's 65504
    assert math.isfinite(float(sums.total)) and not math.isfinite(steps.grad_norm())
    assert float(sums.extras["loss_scale"][0]) == 2.0**15
    for scale in (2.0**14, 2.0**13, 2.0**12, 2.0**11):
        assert steps.overflowed() and steps.ways.scaler.scale == scale
        steps.drop()
        steps.accumulate([torch.ones(1, 4)], loss, 1.0)
    assert torch.equal(model.weight.grad, torch.full((4, 4), 16.0))
    steps.step(1.0, 0.0, steps.grad_norm())
    assert steps.ways.scaler.good == 1
    other = Steps(model, params, torch.optim.SGD(params.values(), lr=1.0), Ways(torch.float16, Scaler()))
    other.load(steps.state())
    assert other.ways.scaler == steps.ways.scaler
    assert not Steps(model, params, torch.optim.SGD(params.values(), lr=1.0)).overflowed()
