"""The law from which a token is drawn, its draws, and that a row is alone."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers.generation import logits_process as theirs

from llmkit.inference.request import Request, RequestError
from llmkit.inference.sampler import _from_device, choose, pick, scored, uniform
from llmkit.inference.sampling import Sampling
from llmkit.inference.shortlist import _draw, drawn, draws, largest, nucleus, weighed
from llmkit.inference.steer import Rules, Steer

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
]


def steer(sampling: Sampling, prompt: tuple[int, ...] = (1,), made: tuple[int, ...] = (), **more: Any) -> Steer:
    own = {"index": more.pop("index", 0)}
    request = Request("a", prompt, sampling, processors=more.pop("processors", ()))
    return Steer(Rules(request, more.pop("ends", ()), **more), list(made), **own)


def law_of(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """(V,) probabilities."""
    kept, weights = weighed(logits, sampling)
    full = np.zeros(len(logits))
    full[slice(None) if kept is None else kept] = weights / weights.sum(dtype=np.float64)
    return full


def law_of_theirs(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    scores = torch.from_numpy(logits).double()[None]
    steps = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    steps += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for step in steps:
        scores = step(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_the_law_is_that_of_transformers(how: dict[str, Any]) -> None:
    numbers, sampling = np.random.default_rng(1), Sampling(**how)
    for words in (1, 2, 7, 400, 5000, 20_001):
        for spread in (0.1, 3.0, 12.0):
            logits = (numbers.standard_normal(words) * spread).astype(np.float32)
            logits[numbers.random(words) < 0.1] = -np.inf
            logits[0] = 0.0
            mine, own = law_of(logits, sampling), law_of_theirs(logits, sampling)
            differ = (mine > 0) != (own > 1e-44)
            assert own[differ].sum() < 2e-6 and mine[differ].sum() < 2e-6  # on the border, by rounding
            assert np.abs(mine - own).max() < 1e-6


def test_ties_are_kept_by_top_k_and_cut_in_order_by_top_p() -> None:
    even = np.zeros(4096, np.float32)
    assert (law_of(even, Sampling(temperature=1.0, top_k=3)) > 0).all()
    kept = np.flatnonzero(law_of(even, Sampling(temperature=1.0, top_p=0.25)))
    assert kept.tolist() == list(range(1024))
    two = np.array([1, 3, 3, 3, 0], np.float32)
    assert np.flatnonzero(law_of(two, Sampling(temperature=1.0, top_p=0.5))).tolist() == [1, 2]


def test_the_shortlist_is_what_a_full_sort_gives() -> None:
    numbers = np.random.default_rng(2)
    for words in (1, 63, 64, 65, 1000, 70_000):
        for digits in (0, 6):  # with many ties, with few
            values = np.exp(numbers.standard_normal(words) * 2).round(digits).astype(np.float32)
            for count in {1, min(5, words), min(200, words), words}:
                least = np.sort(values)[-count]
                assert largest(values, count).tolist() == np.flatnonzero(values >= least).tolist()
            order = np.argsort(-values, kind="stable")
            mass = np.cumsum(values[order], dtype=np.float64)
            for share in (0.1, 0.5, 0.95):
                wanted = share * values.sum(dtype=np.float64)
                fewest = order[: int(np.searchsorted(mass, wanted)) + 1]
                assert nucleus(values, share).tolist() == sorted(fewest.tolist())


@cache
def uniforms(count: int) -> list[float]:
    return [uniform(11, 0, place) for place in range(count)]


LAWS = [
    pytest.param(how, marks=[pytest.mark.slow] * (at not in (0, 4, len(SETTINGS) - 1)))
    for at, how in enumerate(SETTINGS)
]


@pytest.mark.parametrize("how", LAWS, ids=str)
def test_draws_follow_the_law(how: dict[str, Any]) -> None:
    logits = (np.random.default_rng(4).standard_normal(24) * 2).astype(np.float32)
    sampling, draws = Sampling(**how), 100_000
    kept, weights = weighed(logits, sampling)
    ids = np.arange(24) if kept is None else kept
    counts = np.bincount([drawn(weights, at)[0] for at in uniforms(draws)], minlength=len(ids))
    wanted = weights.astype(np.float64) / weights.sum(dtype=np.float64) * draws
    if len(ids) > 1:
        assert chisquare(counts, wanted).pvalue > 1e-3
    skewed = wanted.copy()
    skewed[0] += 0.02 * draws
    assert chisquare(counts, skewed / skewed.sum() * draws).pvalue < 1e-6 or len(ids) == 1


def test_two_places_are_drawn_independently() -> None:
    pairs = np.array([[int(uniform(s, i, p) * 4) for p in (0, 1)] for s in range(400) for i in range(25)])
    assert chisquare(np.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16)).pvalue > 1e-3
    across = np.array([[int(uniform(s, i, 3) * 4) for i in (0, 1)] for s in range(10_000)])
    assert chisquare(np.bincount(across[:, 0] * 4 + across[:, 1], minlength=16)).pvalue > 1e-3


def test_a_draw_in_blocks_is_the_draw() -> None:
    weights = np.random.default_rng(5).random(49_152).astype(np.float32)
    weights[np.random.default_rng(6).integers(0, 49_152, 30_000)] = 0
    mass = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    for at in np.linspace(0, 1, 500, endpoint=False):
        found = drawn(weights, float(at))[0]
        before = mass[found - 1] if found else 0.0
        assert weights[found] > 0 and before - 1e-6 <= at <= mass[found] + 1e-6
    assert drawn(weights, np.nextafter(1.0, 0))[0] == np.flatnonzero(weights)[-1]


@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
def test_draws_of_a_step_are_those_of_one_row_at_a_time(spread: float) -> None:
    numbers, asked = np.random.default_rng(8), []
    for how in SETTINGS:
        for words in (3, 400, 9000):
            law = (numbers.standard_normal(words) * spread).astype(np.float32)
            law[1:][numbers.random(words - 1) < 0.2] = -np.inf
            asked += [(law, Sampling(**how), float(at)) for at in numbers.random(5)]
    pairs = list(zip(draws(asked), map(lambda one: _draw(*one), asked), strict=True))
    assert sum(mine[0] != plain[0] for mine, plain in pairs) <= 1  # on the border of two tokens, by rounding
    assert all(abs(mine[1] - plain[1]) <= 1e-5 * plain[1] + 1e-6 for mine, plain in pairs)
    assert draws(asked[:7]) == draws(asked)[:7] and draws(asked[::-1]) == draws(asked)[::-1]


def batch(rows: int, words: int) -> tuple[torch.Tensor, list[Steer]]:
    logits = torch.randn(rows, words, generator=torch.Generator().manual_seed(7)) * 4
    hows = [
        {},
        {"logprobs": 3},
        *SETTINGS,
        {"temperature": 1.0, "repetition_penalty": 1.5, "logprobs": 0},
        {"logit_bias": {3: 50.0}, "temperature": 0.9},
    ]
    steers = [steer(Sampling(seed=at, **hows[at % len(hows)]), (1, 2, 5), (4, 4), index=at % 3) for at in range(rows)]
    return logits, steers


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits, steers = batch(32, 10_007)
    together = choose(list(logits), steers)
    for order in (range(31, -1, -1), range(3, 32, 5), [9]):
        again = choose([logits[at].clone() for at in order], [steers[at] for at in order])
        assert again == [together[at] for at in order]  # to the bit: tokens are compared with their log-probabilities
    assert _from_device(logits, steers) == together  # the way of other devices


ALONE = """
import numpy as np, torch
from llmkit.inference.request import Request
from llmkit.inference.sampler import choose
from llmkit.inference.sampling import Sampling
from llmkit.inference.steer import Rules, Steer
rules = Rules(Request("a", (1,), Sampling(temperature=0.8, top_p=0.9, seed=5)), ())
row = torch.from_numpy(np.random.default_rng(3).standard_normal(999).astype(np.float32))
steers = [Steer(rules, [0] * at, at % 2) for at in range(8)]
said = [(one.id, one.sampling_logprob) for one in choose([row] * 8, steers)]
"""


def test_a_seed_gives_the_same_in_another_process() -> None:
    here: dict[str, Any] = {}
    exec(ALONE, here)
    done = subprocess.run([sys.executable, "-c", ALONE + "print(said)"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(here["said"]) and len(set(here["said"])) > 4


def test_log_probabilities_are_the_model_s_and_the_law_s() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(8)) * 3
    sampling = Sampling(temperature=0.5, top_k=20, logit_bias={7: 3.0}, logprobs=4)
    token = pick(logits.numpy(), steer(sampling))
    full = logits.double().log_softmax(-1)
    biased = logits.clone()
    biased[7] += 3
    assert token.logprob == pytest.approx(full[token.id].item(), abs=1e-6)
    assert token.sampling_logprob == pytest.approx(np.log(law_of(biased.numpy(), sampling)[token.id]), abs=1e-5)
    best = full.topk(4)
    assert list(token.top) == best.indices.tolist()
    assert list(token.top.values()) == pytest.approx(best.values.tolist(), abs=1e-6)
    given = scored(logits, 9, 500)
    assert given.logprob == pytest.approx(full[9].item(), abs=1e-6) and len(given.top) == 500


def test_a_row_without_numbers_or_without_tokens_is_its_request_s_error_alone() -> None:
    good = torch.tensor([0.0, 2.0, 1.0])
    bad = [torch.full((3,), float("nan")), torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([float("inf"), 0, 0])]
    for sampling in (Sampling(), Sampling(temperature=1.0, logprobs=1)):
        rows, steers = [good, *bad, torch.full((3,), float("-inf")), good], [steer(sampling) for _ in range(6)]
        for made in (choose(rows, steers), _from_device(torch.stack(rows), steers)):
            assert [isinstance(one, RequestError) for one in made] == [False, True, True, True, True, False]
            assert "nan" in str(made[1]) and "inf" in str(made[3]) and "no token may be made" in str(made[4])
    with pytest.raises(RequestError, match="nan"):
        scored(bad[0], 1, None)


def test_extreme_temperatures_are_greedy_and_even() -> None:
    logits = np.array([-1e4, 1.0, 1.0001, -np.inf], np.float32)
    assert np.flatnonzero(law_of(logits, Sampling(temperature=1e-300))).tolist() == [2]
    even = law_of(logits, Sampling(temperature=1e300))
    assert even[:3] == pytest.approx([1 / 3] * 3) and even[3] == 0
    assert law_of(np.array([5.0], np.float32), Sampling(temperature=1.0)).tolist() == [1.0]


def test_what_nobody_foresaw_in_one_row_is_its_request_s_error_alone() -> None:
    class Odd:
        def mask(self, words: int) -> Any:
            raise ValueError("a grammar's own fault")

    steers = [steer(Sampling(temperature=1.0)) for _ in range(3)]
    steers[1].matcher = Odd()  # type: ignore[assignment]
    alone, wrong, other = choose([torch.tensor([0.0, 2.0, 1.0])] * 3, steers)
    assert isinstance(wrong, RequestError) and "grammar's own fault" in str(wrong)
    assert not isinstance(alone, RequestError) and alone == other
