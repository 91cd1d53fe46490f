"""KTO: its closed form, TRL's loss on the same batch, and what accumulation must not change."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmkit.data.batches import micro_batches
from llmkit.data.groups import Groups
from llmkit.data.mismatched import mismatched
from llmkit.data.node import FirstFit
from llmkit.losses.kto import Unpaired, baseline, distance, singles, with_baseline
from llmkit.losses.kto_node import Kto, Singles
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from tests.conftest import make_model, make_tokenizer
from tests.losses.test_preference_trl import TEXT, gradient, settings

ROWS = [  # prompt, completion, label
    ([5, 6, 7], [8, 9, 10, 2], True),
    ([20, 21], [22, 2], False),
    ([30, 31, 32, 33, 34], [35, 36, 37, 38, 39, 40, 2], True),
    ([50], [51, 52, 53], True),
    ([60, 61], [62, 63, 64, 65], False),
]


def groups(rows=ROWS):
    sizes = [n for prompt, said, _ in rows for n in (len(prompt), len(said))]
    edges = np.cumsum([0, *sizes])
    weights = [x for prompt, said, _ in rows for x in [0.0] * len(prompt) + [1.0] * len(said)]
    return Groups(
        ids=np.array([x for prompt, said, _ in rows for x in (*prompt, *said)], np.int32),
        weights=np.array(weights, np.float32),
        starts=edges[::2],
        rows=(),
        forks=edges[1::2],
        firsts=np.arange(len(rows) + 1),
        per={"label": np.array([label for *_, label in rows], np.float32)},
    )


def batches(data, ids, size=64):
    return micro_batches(data, ids, FirstFit(), size, 1, True, "cpu", trees=True)


def step(loss, model, reference, ids, size=64):
    """What one step makes of these examples, in rows of a size: z first, then the sum, and its gradient."""
    data, policy, other = groups(), Scored(model), Scored(reference)
    for one in (model, reference):
        install(one, "sdpa")
    model.zero_grad()
    z = 0.0
    if loss.needs_baseline:
        with torch.no_grad():
            odd = mismatched(data, ids, 64)
            parts = [distance(policy(b), other(b), b) for b in batches(odd, range(len(odd)), size)]
        z = baseline(*(sum(float(x) for x in column) for column in zip(*parts, strict=True)))
    total, many = 0.0, batches(data, ids, size)
    extras = {}
    for batch in (with_baseline(b, z) for b in many):
        with torch.no_grad():
            said = other(batch)
        made = Unpaired(loss).summed(singles(policy(batch), said, batch))
        (made.total / len(ids)).backward()
        total += made.total.item() / len(ids)
        for name, pair in made.extras.items():
            extras[name] = [a + float(b) for a, b in zip(extras.get(name, (0.0, 0.0)), pair, strict=True)]
    return total, gradient(model), {name: a / b for name, (a, b) in extras.items()}, z, len(many)


def s(x):
    return 1 / (1 + math.exp(-x))


def test_it_is_its_closed_form():
    both = torch.tensor([0.5, -0.3], dtype=torch.float64)
    said = Singles(both, both, both, torch.tensor([1.0, 0.0]), torch.full((2,), 0.2, dtype=torch.float64))
    made = Kto(beta=0.5, desirable=2.0, undesirable=3.0)(said)
    assert made.losses.tolist() == pytest.approx([2 * (1 - s(0.5 * 0.3)), 3 * (1 - s(0.5 * 0.5))])
    assert made.figures["accuracy"].tolist() == [1, 1]


def test_gradients_are_those_of_differences():
    given = torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64, requires_grad=True)
    rest = given.detach(), torch.ones(3), torch.tensor([1.0, 0.0, 0.0]), torch.full((3,), 0.2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda ratios: Kto(beta=0.5)(Singles(ratios, *rest)).losses.sum(), given)


def test_a_step_of_one_example_has_no_other_to_compare_with():
    with pytest.raises(ValueError, match="no other"):
        mismatched(groups(), [3], 6)


def test_each_prompt_has_the_completions_of_the_one_before_it_in_the_step():
    odd = mismatched(groups(), [3, 1, 4], 6)
    assert [odd.example(i)[0].tolist() for i in range(3)] == [
        [50, 62, 63, 64, 65],
        [20, 21, 51, 52, 53],
        [60, 61, 22, 2],
    ]
    assert [odd.example(i)[1].tolist() for i in range(3)] == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1]]
    assert mismatched(groups(), [3, 2], 6).example(1)[0].tolist() == [30, 31, 32, 33, 34, 51]  # cut


@pytest.mark.parametrize("loss", [Kto(beta=0.5), Kto(beta=0.5, variant="apo_zero")], ids=["kto", "apo_zero"])
def test_accumulation_does_not_change_a_step(loss):
    order = [4, 0, 2, 1, 3]
    whole = step(loss, make_model(1), make_model(2), order)
    parts = step(loss, make_model(1), make_model(2), order, 10)
    assert whole[-1] == 1 and parts[-1] > 2
    assert parts[0] == pytest.approx(whole[0], rel=1e-6) and parts[2] == pytest.approx(whole[2], rel=1e-5)
    assert (parts[1] - whole[1]).abs().max() <= 1e-5 * whole[1].abs().max()


@pytest.mark.parametrize("seeds", [(1, 2), (2, 1)])
@pytest.mark.parametrize("variant", ["kto", "apo_zero"])
def test_it_equals_trls(tmp_path, variant, seeds):
    """Of one pair of models z is above 0, of the other it is held at 0."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    name = {"kto": "kto", "apo_zero": "apo_zero_unpaired"}[variant]
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    order = {"train_sampling_strategy": "sequential"}
    args = KTOConfig(**settings(tmp_path), loss_type=name, beta=0.5, **weights, **order)
    model, reference = (make_model(seed) for seed in seeds)
    data = Dataset.from_list(
        [{"prompt": "hello", "completion": TEXT["chosen"], "label": label} for label in (True, False)]
    )
    trainer = KTOTrainer(model, reference, args, train_dataset=data, processing_class=make_tokenizer())
    rows = [dict(zip(("prompt_ids", "completion_ids", "label"), row, strict=True)) for row in ROWS]
    if variant == "kto":
        rows = [{**row, "KL_completion_ids": rows[at - 1]["completion_ids"]} for at, row in enumerate(rows)]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    ours = Kto(beta=0.5, variant=variant, desirable=1.2, undesirable=0.7)
    made = step(ours, make_model(seeds[0]), make_model(seeds[1]), range(5))
    assert made[0] == pytest.approx(loss.item(), rel=1e-5)
    assert (made[1] - gradient(model)).abs().max() <= 1e-5 * gradient(model).abs().max()
    assert made[3] == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-5)
    for ours, theirs in (("reward_chosen", "rewards/chosen"), ("logps_rejected", "logps/rejected")):
        assert made[2][ours] == pytest.approx(trainer._metrics["train"][theirs][-1], rel=1e-4)


def test_a_step_without_good_ones_has_figures_and_labels_are_asked_for():
    batch = batches(groups(), [1, 4])[0]
    scores = -torch.rand(6)
    made = Unpaired(Kto()).summed(singles(scores, scores, batch))
    assert all(
        float(top) / float(bottom) == pytest.approx(0)
        for name, (top, bottom) in made.extras.items()
        if "chosen" in name
    )
    bare = replace(batch, branches=replace(batch.branches, per={}))
    with pytest.raises(ValueError, match="label"):
        singles(scores, scores, bare)
