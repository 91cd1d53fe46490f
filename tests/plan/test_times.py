"""How long a step takes: proportions that the formulas must keep, and devices by name."""

from dataclasses import replace

import pytest

from llmkit.core.errors import RecipeError
from llmkit.parallel.degrees import Degrees
from llmkit.parallel.node import Ddp, Fsdp, Single
from llmkit.plan.devices import DEVICES, named, recognised
from llmkit.plan.shares import shares
from llmkit.plan.times import Work, times
from tests.plan.test_shares import FULL, MIXED_SHAPE, SHAPE

H100 = DEVICES["h100-80gb"]


def spent(strategy, degrees=Degrees(), held=FULL, device=H100, turns=1, length=8192):
    return times(SHAPE, held, shares(strategy, degrees), degrees, device, Work(8192, length, turns))


def test_recompute_costs_a_forward_and_a_frozen_base_saves_a_third():
    plain = spent(Single(), held=replace(FULL, recompute=0))
    again = spent(Single())
    assert 1.25 < again.compute / plain.compute < 1.4
    assert again.mfu < plain.mfu < 1
    lora = spent(Single(), held=replace(FULL, recompute=0, cost=replace(FULL.cost, trained=40_000_000)))
    assert 0.6 < lora.compute / plain.compute < 0.8


def test_what_is_sent_is_what_the_collectives_send():
    ddp, fsdp = spent(Ddp(), Degrees(replicate=8)), spent(Fsdp(), Degrees(shard=8))
    assert ddp.sent == 2 * 7 / 8 * 4 * SHAPE.params
    assert fsdp.sent == pytest.approx(7 / 8 * (2 * 2 + 4) * SHAPE.params, rel=1e-6)
    twice = spent(Fsdp(), Degrees(shard=8), turns=2)
    assert twice.sent == 2 * fsdp.sent and spent(Ddp(), Degrees(replicate=8), turns=2).sent == ddp.sent


def test_tokens_go_to_experts_and_gradients_of_all_else_to_every_rank():
    shape = MIXED_SHAPE
    held = replace(FULL, cost=replace(FULL.cost, trained=shape.params), recompute=0)

    def sent(strategy, **spread):
        degrees = Degrees(**spread)
        return times(shape, held, shares(strategy, degrees), degrees, H100, Work(256, 128, 3)).sent

    dense, rows = shape.params - shape.experts, 3 * 256 * 2 * 64 * 2  # tokens, experts, hidden, bytes
    tokens = 4 * 1 / 2 * 2 * rows  # there and back in 2 layers, forward and backward
    assert sent(Ddp(), expert=2) == 2 * 1 / 2 * 4 * dense + tokens
    copies = 2 * 1 / 2 * 4 * (dense + shape.experts / 2)
    assert sent(Ddp(), expert=2, replicate=2) == copies + sent(Ddp(), expert=2)
    assert sent(Ddp(), replicate=2) == 2 * 1 / 2 * 4 * shape.params


def test_a_token_is_computed_by_the_experts_that_it_goes_through():
    """2 of 8: a model with 2 experts a layer, both chosen, takes as many operations."""
    shape = MIXED_SHAPE
    assert shape.active == shape.params - shape.experts * 6 // 8

    def computed(one):
        held = replace(FULL, cost=replace(FULL.cost, trained=one.params))
        return times(one, held, shares(Single(), Degrees()), Degrees(), H100, Work(256, 128, 1)).compute

    kept = {k: size for k, size in shape.tensors.items() if ".experts." not in k or k.split(".experts.")[1][0] in "01"}
    small = replace(shape, params=shape.active, tensors=kept, choice=2)
    assert small.experts == shape.experts // 4 and computed(small) == pytest.approx(computed(shape), rel=1e-9)


def test_ranks_that_share_rows_sum_their_gradients_too():
    inner = spent(Single(), Degrees(context=4)).sent - spent(Single(), Degrees()).sent
    assert inner > 0 and spent(Ddp(), Degrees(replicate=2, context=4)).sent == pytest.approx(
        inner - 2 * 3 / 4 * 4 * SHAPE.params + spent(Ddp(), Degrees(replicate=8)).sent
    )
    grown = spent(Fsdp(), Degrees(shard=1, context=8)).sent - spent(Fsdp(), Degrees(shard=8)).sent
    assert grown > 0  # keys and values alone


def test_a_pipeline_waits_for_its_first_and_last_micro_batches():
    """Each of p stages is idle for (p - 1) / (m + p - 1) of a step; what it sends are hidden states and gradients."""
    few, many = (spent(Ddp(), Degrees(pipeline=4), turns=m) for m in (1, 61))
    layers = spent(Ddp(), turns=1).compute / few.compute
    assert 0.9 < layers < 1  # one micro-batch goes through all stages as through one device
    assert many.compute / 61 / few.compute == pytest.approx(64 / 61 / 4, rel=1e-6)
    assert few.sent == 2 * 8192 * SHAPE.hidden * 2


def test_a_slow_network_makes_a_step_wait():
    slow = replace(H100, network=1e9)
    assert spent(Fsdp(), Degrees(shard=16), device=slow).waiting > 0 == spent(Fsdp(), Degrees(shard=16)).waiting


def test_devices_by_name():
    assert recognised("NVIDIA H100 80GB HBM3") is H100
    assert recognised("NVIDIA H200").name == "h200-141gb" and recognised("NVIDIA L40S").name == "l40s-48gb"
    assert recognised("NVIDIA A100-SXM4-80GB").name == "a100-80gb"
    assert recognised("NVIDIA A100-SXM4-40GB").name == "a100-40gb" and recognised("Tesla V100") is None
    with pytest.raises(RecipeError, match="did you mean h100-80gb"):
        named("h100")
