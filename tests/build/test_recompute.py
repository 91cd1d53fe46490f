"""Recompute of all layers or of every second one: equal gradients with dropout on, and a peak in between."""

import numpy as np
import pytest
import torch

from llmkit.adapters.node import Lora, NoAdapter
from llmkit.build.precision import types
from llmkit.build.training import build, how
from llmkit.core.seed import reseed
from llmkit.core.shape import Cost, Shape
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit
from llmkit.data.prepare import Prepared
from llmkit.losses.node import CrossEntropy
from llmkit.models.node import ModelRef, Nf4, NoQuant
from llmkit.models.resolve import resolve
from llmkit.plan.account import FUSED, Held, account
from llmkit.plan.choice import choose
from tests.conftest import make_tokenizer
from tests.train.test_fit import family


def batch(tokens=64):
    starts, ids = np.arange(0, tokens + 1, 16), np.arange(tokens, dtype=np.int32) % 400 + 3
    prepared = Prepared(ids, np.ones(tokens, dtype=np.float32), starts, ())
    return micro_batches(prepared, tuple(range(len(starts) - 1)), FirstFit(), tokens, 1, True, "cpu")[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in ("llama", "gemma2"):
        made[name] = tmp_path_factory.mktemp(name)
        family(name).save_pretrained(made[name])
        make_tokenizer().save_pretrained(made[name])
    return made


def made(folder, adapter, recompute, precision="fp32", quant=NoQuant()):
    """(gradients, bytes that the forward kept)."""
    ref, kinds, kept = ModelRef(name=str(folder)), types(precision, "cpu"), {}
    built = build(resolve(ref), ref, how("cpu", kinds, quant, adapter, False, False), adapter, recompute, 0)
    built.model.train()
    reseed(0, 1, 0)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held on to, so that no place is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=kinds.mixed):
        scores = built.scored(batch())
    CrossEntropy()(scores, batch()).total.backward()
    grads = {name: p.grad for name, p in built.trained.items() if p.grad is not None}
    return grads, sum(t.untyped_storage().nbytes() for t in kept.values())


CASES = [("llama", "lora"), ("llama", "full"), ("llama", "mixed"), ("llama", "nf4"), ("gemma2", "lora")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_gradients_are_equal_with_dropout_on_and_less_is_kept(name, way, folders):
    folder = folders[name]
    adapter = NoAdapter() if way == "full" else Lora(rank=4, dropout=0.2)
    more = ("bf16_mixed" if way == "mixed" else "fp32", Nf4() if way == "nf4" else NoQuant())
    plain, all_kept = made(folder, adapter, 0, *more)
    half, half_kept = made(folder, adapter, 2, *more)
    full, few_kept = made(folder, adapter, 1, *more)
    assert few_kept < half_kept < all_kept
    for key, grad in plain.items():
        for other in (half, full):
            assert float((other[key] - grad).abs().max()) <= 1e-6 * float(grad.abs().max()), key
    if way == "lora":
        again, _ = made(folder, Lora(rank=4), 0)
        assert any(not torch.allclose(again[key], grad) for key, grad in plain.items())  # dropout is on


SHAPE = Shape(135_000_000, 30, 576, 1536, 49152, linears=305_280, keys=192, embedded=28_311_552)
FULL = Held(4, 4, FUSED, Cost(SHAPE.params, head=True), moment_bytes=8, recompute=0, head_bytes=16 << 20)


def accounted(**more):
    return account(SHAPE, Held(**{**vars(FULL), **more}), 4096)


def test_the_account_puts_selective_between_and_knows_the_other_levers():
    kept = [accounted(recompute=every).activations for every in (0, 2, 1)]
    assert kept[0] > 1.7 * kept[1] and kept[1] > 1.7 * kept[2]
    early, away = accounted(recompute=1, gradients=SHAPE.embedded), accounted(offload=True)
    assert early.gradients == 4 * SHAPE.embedded and early.total < accounted(recompute=1).total - 2 * 10**8
    assert away.activations < kept[2] and away.weights == accounted().weights


def test_auto_takes_selective_before_full():
    def chosen(free):
        return choose(SHAPE, FULL, 4096, int(free), "cpu", 1, None, 1)

    sizes = [accounted(recompute=every).total / 0.84 for every in (0, 2, 1)]
    assert [chosen(size).recompute for size in sizes] == [0, 2, 1]
    assert not chosen(sizes[2] * 0.9).fits
