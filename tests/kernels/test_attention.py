"""The compiled attention against its plain twin in fp64: values and gradients on odd shapes."""

import pytest
import torch
from llmkit_kernels import attention
from llmkit_kernels.attention import causal, reference
from llmkit_kernels.build import lacks

pytestmark = pytest.mark.skipif(bool(lacks("attention")), reason=lacks("attention"))

LENGTHS = [(1,), (5,), (63, 1, 64), (65, 2, 130), (600,), (513, 70)]


def laid(lengths, gap=0):
    """Segments of these lengths, `gap` tokens of no segment before each; the number of tokens."""
    segments, end = [], 0
    for length in lengths:
        segments.append((end + gap, end + gap + length))
        end += gap + length
    return segments, end + gap


def made(heads, groups, tokens, size, value, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, size), (tokens, heads // groups, size), (tokens, heads // groups, value)]
    return [torch.randn(s, generator=g).transpose(0, 1).requires_grad_() for s in shapes]  # as models lay them out


def close(a, b, tol=2e-6, least=1e-12):
    assert (a - b).abs().max() <= tol * max(float(b.detach().abs().max()), least)


def compared(lengths, heads=4, groups=2, size=32, value=32, window=0, gap=0, parents=()):
    segments, tokens = laid(lengths, gap)
    ours = made(heads, groups, tokens, size, value)
    theirs = [x.detach().double().requires_grad_() for x in ours]
    out = causal(*ours, segments, size**-0.5, window, parents)
    want = reference.causal(*theirs, segments, size**-0.5, window, parents)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    close(out, want)
    mine, twins = (torch.autograd.grad((made * weight).sum(), given) for made, given in ((out, ours), (want, theirs)))
    largest = max(
        float(b.abs().max()) for b in twins
    )  # a query of one key has a gradient of 0: rounding of large terms
    for a, b in zip(mine, twins, strict=True):
        close(a, b, least=largest)
    return out.detach()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", [0, 1, 50, 100])
def test_lengths_and_windows(lengths, window):
    compared(lengths, window=window)


@pytest.mark.parametrize("heads,groups", [(1, 1), (9, 3), (6, 6), (4, 1)])
@pytest.mark.parametrize("size,value", [(16, 16), (48, 16), (80, 96), (128, 128)])
def test_heads_and_sizes(heads, groups, size, value):
    compared((70, 3), heads, groups, size, value)


TREES = {
    "a pair": ((70, 3, 65), (-1, 0, 0)),
    "two groups, one within the other's segments": ((5, 600, 1, 64, 7, 130), (-1, -1, 0, 1, 0, 1)),
    "three deep": ((63, 2, 100, 1, 9), (-1, 0, 1, 1, 3)),
    "roots alone": ((7, 9), (-1, -1)),
}


@pytest.mark.parametrize("lengths,parents", TREES.values(), ids=TREES)
@pytest.mark.parametrize("window", [0, 1, 50, 100])
def test_branches_see_their_ancestors(lengths, parents, window):
    compared(lengths, window=window, parents=parents, gap=2)


def test_a_branch_is_its_path_alone():
    q, k, v = (x.detach() for x in made(4, 2, 90, 16, 16))
    out = causal(q, k, v, ((0, 40), (40, 70), (70, 90)), 0.2, parents=(-1, 0, 0))
    path = [*range(40), *range(70, 90)]
    alone = causal(*(x[:, path].contiguous() for x in (q, k, v)), ((0, 60),), 0.2)
    close(out[70:], alone[40:], 1e-6)
    assert not torch.allclose(out[70:], causal(q, k, v, ((0, 40), (40, 70), (70, 90)), 0.2)[70:])


@pytest.mark.parametrize("parents", [(-1, 1), (1, -1), (-2, 0)], ids=str)
def test_a_parent_comes_before_its_branches(parents):
    with pytest.raises(ValueError, match="which is no earlier segment"):
        causal(*made(2, 1, 9, 16, 16), ((0, 4), (4, 9)), 1.0, parents=parents)


def test_tokens_of_no_segment_give_zeros_and_get_no_gradient():
    out = compared((7, 40), gap=3)
    assert float(out[:3].abs().sum()) == float(out[10:13].abs().sum()) == 0 < float(out[3:10].abs().sum())
    segments, tokens = laid((), 3)
    assert not causal(*made(2, 1, tokens, 16, 16), segments, 1.0).any()


def test_any_number_of_threads_gives_the_same_bits():
    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        given = made(9, 3, 203, 64, 64)
        out = causal(*given, ((0, 100), (100, 150), (150, 203)), 0.1, parents=(-1, 0, -1))
        grads = torch.autograd.grad(out.square().sum(), given)
        torch.set_num_threads(before)
        return [out, *grads]

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))


def test_scores_of_any_size_stay_finite():
    q, k, v = made(2, 1, 130, 16, 16)
    with torch.no_grad():
        q *= 300
        out = causal(q, k, v, ((0, 130),), 1.0)
        close(out, reference.causal(q.double(), k.double(), v.double(), ((0, 130),), 1.0), 1e-4)


def test_what_is_not_a_number_is_not_hidden():
    q, k, v = (x.detach() for x in made(2, 1, 20, 16, 16))
    k[0, 7] = torch.nan
    out = causal(q, k, v, ((0, 20),), 1.0)
    assert not out[:7].isnan().any() and out[7:, 0].isnan().all() and not out[:, 1].isnan().any()


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"size": 24}], ids=str)
def test_what_does_not_suit_says_so(change):
    given = made(2, 1, 9, change.get("size", 16), 16)
    assert not attention.suits(*(x.to(change.get("dtype", torch.float32)) for x in given))
    assert attention.suits(*made(2, 1, 9, 16, 16))
