"""What lies on a rank: by strategy and degrees."""

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest

from llmkit.core.shape import Cost, Shape
from llmkit.models.outline import PUBLIC, tensors
from llmkit.parallel.degrees import Degrees
from llmkit.parallel.node import Auto, Ddp, Fsdp, Single, Strategy
from llmkit.plan.account import MIXED, Held, account
from llmkit.plan.choice import choose
from llmkit.plan.shares import _WAYS, shares

CONFIG = PUBLIC["meta-llama/Llama-3.1-8B"]
SHAPE = Shape.read(CONFIG, tensors(CONFIG))
FULL = Held(4, 4, MIXED, Cost(SHAPE.params, head=True), moment_bytes=8, recompute=1, head_bytes=1 << 28, short=2)


def zero(stage, optimizer="none", params="none"):
    return SimpleNamespace(kind="zero", stage=stage, offload=SimpleNamespace(optimizer=optimizer, params=params))


def of(strategy, **degrees):
    return account(SHAPE, FULL, 8192, shares(strategy, Degrees(**degrees)))


def test_the_table_of_public_shapes_knows_how_many_parameters_there_are():
    big = PUBLIC["meta-llama/Llama-3.1-70B"]
    assert SHAPE.params == 8_030_261_248 and Shape.read(big, tensors(big)).params == 70_553_706_496


def test_every_strategy_has_its_shares():
    union = get_args(get_args(Strategy)[0])
    assert {kind.kind for kind in union if kind is not Auto} <= _WAYS.keys()


def test_replicas_hold_all_and_shards_their_part():
    one, copy, part = of(Single()), of(Ddp(), replicate=8), of(Fsdp(), shard=8)
    assert copy.weights == one.weights and copy.optimizer == one.optimizer and copy.communication > 0
    assert copy.early == copy.gradients and one.early == 0  # buckets stay
    assert part.weights * 8 == pytest.approx(one.weights, rel=1e-6) and part.optimizer * 8 == one.optimizer
    assert part.gradients * 8 == one.gradients and part.activations == one.activations
    assert of(Fsdp(), replicate=2, shard=4).weights == 2 * part.weights


def test_zero_cuts_more_by_stage_and_moves_away():
    stages = [of(zero(stage), shard=8) for stage in (1, 2, 3)]
    whole, cut = of(Single()), of(Fsdp(), shard=8)
    assert [s.optimizer for s in stages] == [cut.optimizer * 12 // 8] * 3  # and a copy of the weights in fp32
    assert [s.gradients for s in stages] == [whole.gradients, cut.gradients, cut.gradients]
    assert [s.weights for s in stages] == [whole.weights, whole.weights, cut.weights]
    away = of(zero(3, "cpu", "cpu"), shard=8)
    assert away.optimizer == away.weights == away.gradients == 0 and away.activations == whole.activations


def test_tensor_and_context_cut_what_is_in_a_layer_and_a_row():
    plain, tensor, context = of(Single()), of(Single(), tensor=2), of(Single(), context=2)
    assert tensor.weights < 0.6 * plain.weights and tensor.working < plain.working
    assert context.weights == plain.weights and context.activations * 2 == plain.activations
    assert context.communication > plain.communication  # keys and values, and buckets of gradients


def test_ranks_that_share_rows_hold_parameters_together_under_fsdp():
    shared, shards = of(Fsdp(), shard=2, context=4), of(Fsdp(), shard=8)
    assert (shared.weights, shared.gradients, shared.optimizer) == (shards.weights, shards.gradients, shards.optimizer)
    assert of(Fsdp(), shard=1, context=8).weights == shards.weights


MIXTURE = {"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
MIXTURE |= {"num_attention_heads": 4, "vocab_size": 512, "num_experts_per_tok": 2, "num_local_experts": 8}
WEIGHTS = {"model.embed_tokens.weight": [512, 64], "lm_head.weight": [512, 64]}
for _layer in (f"model.layers.{k}." for k in range(2)):
    WEIGHTS |= {f"{_layer}self_attn.{name}_proj.weight": [64, 64] for name in "qkvo"}
    WEIGHTS[f"{_layer}block_sparse_moe.gate.weight"] = [8, 64]
    for _one in (f"{_layer}block_sparse_moe.experts.{e}." for e in range(8)):
        WEIGHTS |= {f"{_one}w1.weight": [128, 64], f"{_one}w2.weight": [64, 128], f"{_one}w3.weight": [128, 64]}
MIXED_SHAPE = Shape.read(MIXTURE, WEIGHTS)


def test_experts_lie_on_their_ranks_and_all_else_on_every_one():
    shape, cost = MIXED_SHAPE, Cost(MIXED_SHAPE.params, head=True)
    held = Held(4, 4, MIXED, cost, moment_bytes=8, recompute=1, head_bytes=0)
    assert (shape.experts, shape.mixed, shape.chosen) == (2 * 8 * 3 * 64 * 128, 2, 2)
    one, two = (account(shape, held, 256, shares(Ddp(), Degrees(expert=n))) for n in (1, 2))
    assert one.weights - two.weights == 4 * shape.experts // 2
    assert one.optimizer - two.optimizer == 8 * shape.experts // 2
    assert one.gradients - two.gradients == 4 * shape.experts // 2
    assert two.loaded == one.loaded and two.activations == one.activations
    way = 2 * 4 * 2 * 64 * 256  # as many rows given as taken, of two experts for each token
    assert two.communication - one.communication == 4 * shape.params + way  # and a bucket, larger than this model
    both = account(shape, held, 256, shares(Fsdp(), Degrees(shard=2, expert=2)))
    assert both.weights * 2 == two.weights and both.optimizer * 2 == two.optimizer


def test_a_stage_has_its_layers_and_as_many_micro_batches_as_it_is_ahead():
    """Llama 8B has 32 layers of 218 M and a head of 525 M: of 4 stages the last has two layers less than others."""
    cut = shares(Ddp(), Degrees(pipeline=4))
    assert cut.stage(SHAPE) == 9 / 32
    plain, one = of(Ddp()), of(Ddp(), pipeline=4)
    assert one.weights < 0.4 * plain.weights and one.optimizer < 0.4 * plain.optimizer
    several = account(SHAPE, replace(FULL, turns=8), 8192, cut)
    head = 2 * 4 * SHAPE.hidden * 8192  # its input, and the gradient of that
    assert several.activations - head == pytest.approx(4 * (one.activations - head))
    assert several.activations - head == pytest.approx(4 * 9 / 32 * (plain.activations - head))


def test_auto_leaves_a_pipeline_enough_micro_batches():
    free = 1 << 40
    alone = choose(SHAPE, FULL, 512, free, "cuda", None, 1, 64, shares(Ddp(), Degrees()))
    staged = choose(SHAPE, FULL, 512, free, "cuda", None, 1, 64, shares(Ddp(), Degrees(pipeline=4)))
    assert (alone.rows, staged.rows) == (16, 4)
