"""The loop: any factoring of a batch gives the same gradients; the guard; evaluation that fails."""

import math

import numpy as np
import pytest
import torch

from llmkit.core.errors import DataError, ResourceError
from llmkit.core.types import LossSum
from llmkit.data.batches import micro_batches
from llmkit.data.node import FirstFit, NoPacking
from llmkit.data.prepare import Prepared
from llmkit.losses.node import CrossEntropy
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from llmkit.parallel.steps import Steps
from llmkit.train.fit import Hooks, Plan, Progress, StepData, fit
from llmkit.train.guard import Watch, named
from llmkit.train.node import Checkpointing, Evaluating, Guard
from llmkit.train.schedule import Constant, Cosine, Linear, Wsd
from tests.conftest import make_model


def data(lengths=(7, 1, 13, 4, 9, 2, 11)):
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(3, 400, starts[-1]).astype(np.int32)
    return Prepared(ids, rng.choice([0, 1, 0.5], starts[-1]).astype(np.float32), starts, ())


def family(name):
    import transformers as t

    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    sizes |= dict(vocab_size=448, head_dim=8, max_position_embeddings=128, pad_token_id=0)
    torch.manual_seed(0)
    if name == "llama":
        return make_model()
    made = {
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**sizes, tie_word_embeddings=False)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**sizes, sliding_window=4, query_pre_attn_scalar=8)),
        "gpt_oss": lambda: t.GptOssForCausalLM(
            t.GptOssConfig(**sizes, sliding_window=4, num_local_experts=4, num_experts_per_tok=2)
        ),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**{k: v for k, v in sizes.items() if k != "head_dim"})),
        "granite": lambda: t.GraniteForCausalLM(
            t.GraniteConfig(**{k: v for k, v in sizes.items() if k != "head_dim"}, logits_scaling=3.0)
        ),
    }
    return made[name]()


def gradients(model, prepared, packing, rows, contexts=True, capacity=16):
    install(model, "sdpa")
    model.requires_grad_(True)
    model.zero_grad()
    params = dict(model.named_parameters())
    steps = Steps(Scored(model), params, torch.optim.SGD(params.values(), lr=1.0))
    ids = tuple(range(len(prepared)))
    batches = micro_batches(prepared, ids, packing, capacity, rows, contexts, "cpu")
    count = sum(prepared.supervised(i) for i in ids)
    sums = steps.accumulate(batches, CrossEntropy(), count)
    assert float(sums.count) == pytest.approx(count)
    return float(sums.total) / count, {name: p.grad.clone() for name, p in params.items() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_oss", "phi3", "granite"])
def test_packing_and_any_factoring_into_micro_batches_give_equal_gradients(name):
    prepared, model = data(), family(name).eval()
    with torch.no_grad():  # away from zero, where norms of families start
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    plain_loss, plain = gradients(model, prepared, NoPacking(), 1, contexts=False)
    for packing, rows, contexts in (
        (FirstFit(), 1, True),
        (FirstFit(), 9, True),
        (NoPacking(), 3, True),
        (NoPacking(), 7, False),
    ):
        loss, grads = gradients(model, prepared, packing, rows, contexts)
        assert abs(loss - plain_loss) <= 1e-6 * plain_loss
        assert grads.keys() == plain.keys()
        top = max(float(g.abs().max()) for g in plain.values())
        for key, grad in grads.items():
            limit = max(float(plain[key].abs().max()), 1e-3 * top)
            assert (grad - plain[key]).abs().max() <= 2e-6 * limit, (packing, rows, key)


class Fake:
    """A stepper whose losses are given."""

    def __init__(self, losses, norms=None):
        self.losses, self.norms, self.applied, self.now = losses, norms or [1.0] * len(losses), [], 0

    def accumulate(self, batches, loss, count, turns=1):
        list(batches)
        self.now += 1
        return LossSum(torch.tensor(self.losses[self.now - 1] * count), torch.tensor(count))

    def rate(self, factor):
        pass

    def overflowed(self):
        return False

    def grad_norm(self):
        return self.norms[self.now - 1]

    def step(self, factor, clip, norm):
        self.applied.append(self.now)

    def drop(self):
        pass


def loop(
    stepper,
    steps,
    guard=Guard(),
    evaluate=None,
    every=None,
    start=Progress(),
    checkpoint=Checkpointing(every=2),
    alone=True,
    **more,
):
    lines, saves = [], []
    plan = Plan(steps, 5, 0, 1e-3, 1.0, Constant(), guard, Evaluating(every=every, **more), checkpoint)
    hooks = Hooks(
        data=lambda step: StepData(0, (step, step + 100), (), 8, 4, 4.0),
        log=lines.append,
        evaluate=evaluate,
        save=lambda progress, due: saves.append((progress.step, due)),
        asked_to_stop=lambda: "",
        measure=lambda data, seconds: {},
        show=lambda line: None,
        alone=alone,
    )
    return (lambda: fit(stepper, CrossEntropy(), plan, hooks, start)), lines, saves


@pytest.mark.parametrize("alone", [True, False])
def test_t7_an_evaluation_that_fails_on_one_rank_waits_for_no_other(alone):
    def evaluate(step):
        if step:
            raise ValueError("no memory")
        return {"valid.loss": 1.0}

    go, _, saves = loop(
        Fake([1.0] * 4), 4, evaluate=evaluate, every=2, checkpoint=Checkpointing(every=100), alone=alone
    )
    with pytest.raises(DataError, match="after step 2 failed: no memory"):
        go()
    assert saves == ([(2, False)] if alone else [])  # a save is a meeting of all ranks


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_t1_a_loss_that_is_not_finite_stops_with_step_samples_and_lever(bad):
    stepper = Fake([1.0, 1.0, bad, 1.0])
    go, lines, saves = loop(stepper, 4)
    with pytest.raises(ResourceError, match=r"step 3: the loss is (nan|inf); sample ids 2, 102; fix: lower optim.lr"):
        go()
    assert stepper.applied == [1, 2] and saves == [(2, True)] and [line["step"] for line in lines[:2]] == [1, 2]


def test_t1_rows_are_named_by_file_and_line():
    assert named((7, 3, 9), (("a", 4), ("b", 1), ("a", 2))) == "sample ids 7, 3, 9, rows a:2, 4, rows b:1"
    assert named(range(18), [("a", 1)] * 18).endswith("14, 15 and 2 more, rows a:1")


def test_t1_skip_leaves_the_optimizer_untouched_and_a_streak_stops():
    stepper = Fake([1.0, 1.0, 1.0, 1.0], norms=[1.0, math.inf, 1.0, 1.0])
    go, lines, _ = loop(stepper, 4, Guard(nonfinite="skip"))
    assert go().skipped == 1 and stepper.applied == [1, 3, 4]
    assert [line.get("skipped") for line in lines if line["event"] == "train"] == [None, [1, 101], None, None]
    go, _, _ = loop(Fake([1.0, *[math.nan] * 5]), 6, Guard(nonfinite="skip"))
    with pytest.raises(ResourceError, match="3 steps in a row were skipped"):
        go()


def test_t1_a_spike_is_ten_medians():
    losses = [1.0] * 12 + [10.5]
    go, _, _ = loop(Fake(losses), 13)
    with pytest.raises(ResourceError, match=r"step 13: the loss 10.5 is 10.5 times its median 1"):
        go()
    go, _, _ = loop(Fake([1.0] * 12 + [9.5]), 13)
    assert go().step == 13
    assert Watch((1.0,) * 5).trouble(Guard(), 100.0, 1.0) == ""  # too few to judge
    assert Watch((-1.0,) * 12).trouble(Guard(), 0.5, 1.0) == ""  # of losses around 0


def test_t7_an_evaluation_that_fails_saves_first_names_itself_and_leaves_the_best():
    def evaluate(step):
        if step == 4:
            raise ZeroDivisionError("no tokens")
        return {"valid.loss": 5.0 - step}

    go, lines, saves = loop(
        Fake([1.0] * 6), 6, evaluate=evaluate, every=2, checkpoint=Checkpointing(every=100, best="valid.loss")
    )
    with pytest.raises(DataError, match="evaluate: the evaluation after step 4 failed: no tokens"):
        go()
    assert saves == [(2, True), (4, False)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_t1_an_evaluation_that_is_not_finite_meets_the_policy_and_is_never_the_best(bad):
    seen = {0: 5.0, 2: 3.0, 4: bad, 6: 2.0}
    best = Checkpointing(best="valid.loss")
    how = {"evaluate": lambda step: {"valid.loss": seen[step]}, "every": 2, "checkpoint": best}
    go, _, saves = loop(Fake([1.0] * 6), 6, **how)
    with pytest.raises(ResourceError, match=rf"step 4: valid.loss is {bad}; fix: lower optim.lr"):
        go()
    assert saves == [(2, True)]
    go, lines, saves = loop(Fake([1.0] * 6), 6, Guard(nonfinite="skip"), **how)
    done = go()
    assert (done.best, done.best_step) == (2.0, 6) and saves == [(2, True), (6, True)]
    seen[2], seen[6] = bad, bad
    assert loop(Fake([1.0] * 6), 6, Guard(nonfinite="skip"), **how)[0]().best is None


def test_a_run_that_stopped_before_its_evaluation_makes_up_for_it():
    seen = []
    start = Progress(step=2, evaluated=0, saved=0)
    go, lines, saves = loop(
        Fake([1.0] * 4), 4, evaluate=lambda s: seen.append(s) or {"valid.loss": 1.0}, every=2, start=start
    )
    go()
    assert seen == [2, 4] and saves == [(2, True), (4, True)]


def test_training_ends_early_when_evaluations_do_not_get_better_and_the_last_one_is_saved():
    seen = {0: 0.1, 2: 3.0, 4: 2.95, 6: 2.99, 8: 1.0, 10: 0.5}
    how = {
        "evaluate": lambda step: {"valid.loss": seen[step]},
        "every": 2,
        "checkpoint": Checkpointing(best="valid.loss"),
    }
    go, _, saves = loop(Fake([1.0] * 10), 10, patience=2, min_delta=0.1, **how)
    done = go()
    assert (done.step, done.best, done.best_step, done.stale) == (6, 2.95, 4, 2) and saves[-1] == (6, True)
    assert loop(Fake([]), 10, start=done, patience=2, min_delta=0.1, **how)[0]().step == 6  # a run killed at its end
    assert loop(Fake([1.0] * 10), 10, patience=2, **how)[0]().step == 10  # 2.95 is better than 3.0


@pytest.mark.parametrize(("times", "steps"), [(1, [0, 5, 10]), (2, [0, 3, 5, 8, 10]), (9, [*range(11)])])
def test_evaluations_and_checkpoints_lie_evenly_in_an_epoch(times, steps):
    seen = []
    go, _, saves = loop(
        Fake([1.0] * 10),
        10,
        evaluate=lambda step: seen.append(step) or {"valid.loss": 1.0},
        per_epoch=times,
        checkpoint=Checkpointing(per_epoch=times),
    )
    go()
    assert seen == steps and [step for step, _ in saves] == steps[1:]


def test_schedules_begin_end_and_fall_as_they_say():
    steps = 100
    for schedule in (Linear(warmup=0.1), Cosine(warmup=10), Wsd(warmup=0.1, decay=0.2), Constant(warmup=10)):
        factors = [schedule(step, steps) for step in range(1, steps + 1)]
        assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert max(factors) == 1.0 and all(f >= 0 for f in factors)
    assert Cosine(warmup=0.0)(51, 100) == pytest.approx(0.5)
    assert Linear()(51, 100) == pytest.approx(0.5) and Linear(floor=0.2)(100, 100) == pytest.approx(0.208)
    wsd = [Wsd(decay=0.2)(step, 100) for step in range(1, 101)]
    assert wsd[79] == 1.0 and wsd[90] == pytest.approx(0.5) and wsd[99] == pytest.approx(0.05)
