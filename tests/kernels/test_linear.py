"""The compiled linear: right, and the same to the bit for a row whatever is computed beside it."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from llmkit_kernels.build import lacks
from llmkit_kernels.gated import silu_mul
from llmkit_kernels.linear import RANK, Low, gated, linear, many, place, reference, suits

pytestmark = pytest.mark.skipif(bool(lacks("linear")), reason=lacks("linear"))
SIZES = [(576, 192), (128, 64), (130, 70), (48, 17), (17, 48), (7, 5), (16, 16), (1, 1), (300, 1)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size,out", SIZES)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16, 17, 21, 22, 31, 32, 33, 40])
def test_it_is_a_product_with_the_weight(rows, size, out):
    x, weight, bias = drawn(rows, size), drawn(out, size, seed=1), drawn(out, seed=2)
    for given in (None, bias):
        made = linear(x, weight, given)
        want = reference.linear(x.double(), weight.double(), None if given is None else given.double())
        assert made.shape == want.shape and (made - want).abs().max() <= 1e-6 * max(1, size**0.5) * want.abs().max()


@pytest.mark.parametrize("size,out", SIZES)
def test_a_row_is_the_same_whatever_is_beside_it_and_wherever_it_stands(size, out):
    x, weight, bias = drawn(203, size), drawn(out, size, seed=1), drawn(out, seed=2)
    x[7] = torch.inf  # what others hold does not spill over
    alone = torch.cat([linear(row[None], weight, bias) for row in x])
    order = torch.randperm(203, generator=torch.Generator().manual_seed(3))
    for count in (2, 3, 4, 5, 6, 8, 9, 11, 16, 17, 21, 22, 32, 33, 64, 100, 203):
        for begin in (0, 203 - count):
            chosen = order[begin : begin + count]
            assert linear(x[chosen], weight, bias).nan_to_num().equal(alone[chosen].nan_to_num())
    assert alone[[i for i in range(203) if i != 7]].isfinite().all()


def test_threads_move_no_sum():
    x, weight, other, made = drawn(200, 48), drawn(333, 48, seed=1), drawn(333, 48, seed=2), []
    before, lows = torch.get_num_threads(), [lora(48, 333, 80, 0.5), lora(48, 333, 16, 2.0, seed=7)]
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            made.append([linear(x[:rows], weight) for rows in (200, 3, 7, 9, 30)])
            for rows in (200, 3, 7, 9, 30):  # each needs what all threads made of the LoRAs
                made[-1] += [many(x[:rows], [weight, other], [None, None], lows)]
                made[-1] += [gated(x[:rows], weight, other, None, None, lows)]
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for one, other in pairwise(made) for a, b in zip(one, other, strict=True))


def test_rows_and_weights_that_lie_apart_in_memory():
    x, weight = drawn(19, 64)[::2, 3:51], drawn(48, 20, seed=1).T
    for rows in (3, 5, 10):
        assert linear(x[:rows], weight).equal(linear(x[:rows].contiguous(), weight.contiguous()))
    assert linear(drawn(48, 9).T, weight).shape == (9, 20) and not suits(x, weight)
    assert linear(x[:0], weight).shape == (0, 20)


def test_where_a_weight_lies():
    weight = drawn(4, 16)
    was = place(weight)
    assert was == place(weight) and was != place(weight.clone()) and was != place(weight.view(8, 8)) is not None
    assert place(weight.T) is place(weight.double()) is place(weight[:, ::2]) is None
    assert place(weight.requires_grad_()) != was


def test_what_does_not_go_together_is_refused():
    x, weight = drawn(3, 16), drawn(4, 16)
    for given in ((x, drawn(4, 17)), (x[0], weight), (x, weight, drawn(5)), (x.double(), weight), (x, weight.half())):
        with pytest.raises(ValueError, match=r"do not go with|not fp32"):
            linear(*given)
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        linear(x, weight.requires_grad_())


@pytest.mark.slow
def test_other_vectors_give_a_right_product_too(tmp_path):
    """The same source for a CPU with half as wide vectors, if this one can run that."""
    from llmkit_kernels import build

    if "avx2" not in (flags := " ".join(build._processor())) or "fma" not in flags:
        pytest.skip("this CPU has no AVX2")
    options = " ".join("-mavx2 -mfma -Wno-psabi" if flag == "-march=native" else flag for flag in build.FLAGS)
    code = (
        "import torch; from llmkit_kernels import build; from llmkit_kernels.linear import linear\n"
        f"build.FLAGS = tuple({options!r}.split())\n"
        "torch.manual_seed(0); x, w = torch.randn(20, 144), torch.randn(70, 144); made = linear(x, w)\n"
        "assert (made - x @ w.T).abs().max() < 1e-4, made\n"
        "assert all(made[3 : 3 + rows].equal(linear(x[3 : 3 + rows], w)) for rows in (1, 4, 6, 9, 17))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LLMKIT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("size", [64, 50, 7])
@pytest.mark.parametrize("rows", [1, 3, 7, 16, 17, 32, 200])
def test_several_weights_at_once_are_each_to_the_bit_what_it_is_alone(rows, size):
    x, outs = drawn(rows, size + 3)[:, 3:], (48, 17, 1, 130)
    weights = [drawn(out, size, seed=out) for out in outs]
    biases = [None, drawn(17, seed=1), drawn(1, seed=2), None]
    made = many(x, weights, biases)
    assert made.shape == (rows, sum(outs))
    for part, weight, bias in zip(made.split(outs, 1), weights, biases, strict=True):
        assert part.equal(linear(x, weight, bias))


@pytest.mark.parametrize("size,out", [(64, 96), (50, 33), (16, 1), (7, 200)])
@pytest.mark.parametrize("rows", [1, 3, 7, 16, 17, 32, 200])
def test_a_gated_product_is_to_the_bit_what_its_parts_give(rows, size, out):
    x, gate, up = drawn(rows, size) * 3, drawn(out, size, seed=1), drawn(out, size, seed=2)
    for biases in ((None, None), (drawn(out, seed=3), drawn(out, seed=4))):
        want = silu_mul(linear(x, gate, biases[0]), linear(x, up, biases[1]))
        assert gated(x, gate, up, *biases).equal(want)
    assert gated(x[:0], gate, up).shape == (0, out)
    with pytest.raises(ValueError, match="do not go together|does not go with"):
        gated(x, gate, drawn(out + 1, size))


def lora(size, out, rank, scale, seed=5):
    return Low(drawn(rank, size, seed=seed), drawn(out, rank, seed=seed + 1), scale)


@pytest.mark.parametrize("size,out,rank", [(64, 96, 16), (50, 33, 8), (7, 200, 16), (48, 16, 40), (144, 80, RANK)])
def test_what_a_lora_adds_is_right_and_the_same_whatever_is_beside_it(size, out, rank):
    x, weights = drawn(203, size), [drawn(out, size, seed=1), drawn(17, size, seed=2), drawn(out, size, seed=3)]
    biases, lows = [None, drawn(17, seed=4), drawn(out, seed=5)], [lora(size, out, rank, 0.5), None]
    lows.append(lora(size, out, 3, 2.0, seed=7))
    alone = torch.cat([many(row[None], weights, biases, lows) for row in x])
    want = many(x, weights, biases).double()
    for begin, low in ((0, lows[0]), (out + 17, lows[2])):
        added = (x.double() @ low.down.double().T) @ low.up.double().T
        want[:, begin : begin + out] += low.scale * added
    assert (alone - want).abs().max() <= 1e-6 * want.abs().max()
    for count in (2, 4, 5, 8, 16, 17, 22, 32, 33, 100, 203):
        assert many(x[:count], weights, biases, lows).equal(alone[:count])
        both = gated(x[:count], weights[0], weights[2], None, biases[2], [lows[0], lows[2]])
        assert both.equal(silu_mul(*(alone[:count, at : at + out].contiguous() for at in (0, out + 17))))


def test_a_lora_that_does_not_go_with_its_linear_is_refused():
    x, weight = drawn(3, 16), drawn(4, 16)
    for low in (lora(17, 4, 2, 1.0), lora(16, 5, 2, 1.0)):
        with pytest.raises(ValueError, match="does not go with"):
            many(x, [weight], [None], [low])
    with pytest.raises(ValueError, match=f"rank {RANK + 1} is none of {RANK} at most"):
        many(x, [weight], [None], [lora(16, 4, RANK + 1, 1.0)])
    with pytest.raises(ValueError, match="not fp32"):
        many(x, [weight], [None], [Low(drawn(2, 16).double(), drawn(4, 2), 1.0)])
    low = lora(16, 4, 2, 1.0)
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        many(x, [weight], [None], [Low(low.down, low.up.requires_grad_(), 1.0)])


def test_what_torch_makes_by_default_changes_nothing():
    """transformers sets it for the whole process while it loads a model."""
    x, weight, other = drawn(3, 48), drawn(17, 48, seed=1), drawn(17, 48, seed=2)
    want = linear(x, weight), gated(x, weight, other), linear(x[:1], weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = linear(x, weight), gated(x, weight, other), linear(x[:1], weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and a.equal(b) for a, b in zip(made, want, strict=True))
