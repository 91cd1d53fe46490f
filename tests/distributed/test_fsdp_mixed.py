"""Under mixed precision, cut weights are gathered in 16 bits, and the run is what one process does."""

import torch
from torch import nn

from llmkit.parallel.fsdp import _sent
from tests.distributed import lines, sft, trained


def test_a_quantised_base_is_sent_as_it_is():
    plain, quantised = nn.Linear(2, 2), nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert _sent(plain, torch.bfloat16).param_dtype is torch.bfloat16
    assert _sent(quantised, torch.bfloat16).param_dtype is None and _sent(plain, None).param_dtype is None


def test_losses_are_those_of_one_process(tiny, rows, tmp_path):
    def make(strategy):
        more = {"adapter": {"kind": "none"}, "precision": "bf16_mixed", "parallel": {"strategy": strategy}}
        return lambda out: sft(tiny, rows, out, **more)

    one, two = trained(1, make("single"), tmp_path, "one"), trained(2, make("fsdp"), tmp_path, "two")
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= 2e-3 * theirs["loss"]
        assert abs(ours["grad_norm"] - theirs["grad_norm"]) <= 2e-2 * theirs["grad_norm"]
