"""Losses of preference equal TRL's on the same batch: theirs padded, ours packed."""

import pytest
import torch

from llmkit.core.types import Batch, Branches, Packed, Segment
from llmkit.losses.direct_node import Cpo, Nll, Orpo, SimPo
from llmkit.losses.preference import sides
from llmkit.losses.preference_node import Mixture, Part
from llmkit.losses.referred_node import Aot, Apo, Bco, Dpo, Ipo, Nca, Sppo
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from tests.conftest import make_model, make_tokenizer

ROWS = [  # prompt, chosen, rejected
    ([5, 6, 7], [8, 9, 10, 2], [11, 12, 2]),
    ([20, 21], [22, 2], [23, 24, 25, 26, 2]),
    ([30, 31, 32, 33, 34], [35, 36, 37, 38, 39, 40, 2], [41, 42, 43, 44, 45, 46, 2]),
    ([50], [51, 52, 53], [54, 55, 56, 57, 58, 59]),
]
EVEN = [([50], [51, 52, 53], [54, 55, 56, 57]), ([60], [61, 62, 63], [64, 65])]
"""Chosen completions of one length, after prompts of a single token."""
TEXT = {"prompt": "hello", "chosen": " world", "rejected": " fox"}
"""What a trainer is made with, before it is given the rows above."""


def packed(rows):
    """All completions behind their prompts, in one row."""
    tokens, positions, labels, weights, segments, of = [], [], [], [], [], []
    for prompt, *both in rows:
        for completion in both:
            text, start = [*prompt, *completion], len(tokens)
            tokens += text[:-1]
            labels += text[1:]
            positions += range(len(text) - 1)
            weights += [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
            of += [len(segments)] * len(completion)
            segments.append(Segment(0, start, len(tokens)))
    branches = Branches(torch.tensor(of), torch.arange(len(segments)) // 2)
    rows = (torch.tensor([one]) for one in (tokens, positions, labels, weights))
    return Batch(*rows, Packed(tuple(segments)), (), branches=branches)


def ours(model, loss, batch, reference=None):
    """Mean loss, gradient and mean figures."""
    install(model, "sdpa")
    model.zero_grad()
    tail, other = loss.tail, None
    if reference is not None:
        install(reference, "sdpa")
        with torch.no_grad():
            other = sides(Scored(reference)(batch), batch, tail)
    made = loss(sides(Scored(model)(batch), batch, tail), other)
    made.losses.mean().backward()
    return made.losses.mean().item(), gradient(model), {n: f.mean().item() for n, f in made.figures.items()}


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def close(mine, theirs):
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert (mine[1] - theirs[1]).abs().max() <= 1e-5 * theirs[1].abs().max()


def settings(folder, **more):
    plain = {"report_to": [], "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4}
    return {"output_dir": str(folder), **plain, "gradient_checkpointing": False, "disable_dropout": True} | more


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What TRL's trainer makes of ROWS: loss, gradient and figures."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in ROWS]
    data = Dataset.from_list([TEXT])

    def run(**more):
        args = DPOConfig(**settings(tmp_path_factory.mktemp("trl")), **more)
        model, reference = make_model(1), make_model(2)
        trainer = DPOTrainer(model, reference, args, train_dataset=data, processing_class=make_tokenizer())
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.item(), gradient(model), {name: value[-1] for name, value in trainer._metrics["train"].items()}

    return run


MANY = {
    "sigmoid": (Dpo(beta=0.3), {}),
    "hinge": (Dpo(beta=0.3, variant="hinge"), {}),
    "robust": (Dpo(beta=0.3, variant="robust", label_smoothing=0.2), {"label_smoothing": 0.2}),
    "exo_pair": (Dpo(beta=0.3, variant="exo", label_smoothing=0.01), {"label_smoothing": 0.01}),
    "discopop": (Dpo(beta=0.3, variant="discopop", temperature=0.2), {"discopop_tau": 0.2}),
    "sigmoid_norm": (Dpo(beta=0.3, average=True), {}),
    "ipo": (Ipo(tau=0.3), {}),
    "nca_pair": (Nca(beta=0.3), {}),
    "bco_pair": (Bco(beta=0.3), {}),
    "sppo_hard": (Sppo(beta=0.3), {}),
    "aot": (Aot(beta=0.3, label_smoothing=0.1), {"label_smoothing": 0.1}),
    "aot_unpaired": (Aot(beta=0.3, paired=False), {}),
    "apo_zero": (Apo(beta=0.3), {}),
    "apo_down": (Apo(beta=0.3, variant="down"), {}),
    "sft": (Nll(per="token"), {}),
}


@pytest.mark.parametrize("name", MANY)
def test_each_loss_equals_trls(theirs, name):
    loss, more = MANY[name]
    made = theirs(loss_type=[name], beta=0.3, **more)
    mine = ours(make_model(1), loss, packed(ROWS), make_model(2))
    close(mine, made)
    if name == "sigmoid":
        names = {"reward_margin": "rewards/margins", "accuracy": "rewards/accuracies", "logps_chosen": "logps/chosen"}
        for figure, other in names.items():
            assert mine[2][figure] == pytest.approx(made[2][other], rel=1e-5)


@pytest.mark.parametrize(
    ("f", "name", "more"),
    [
        ("forward_kl", "forward_kl", {}),
        ("js", "js_divergence", {}),
        ("alpha", "alpha_divergence", {"f_alpha_divergence_coef": 0.7}),  # theirs is one less ours
    ],
)
def test_each_divergence_equals_trls(theirs, f, name, more):
    made = theirs(loss_type=["sigmoid"], beta=0.3, f_divergence_type=name, **more)
    close(ours(make_model(1), Dpo(beta=0.3, f=f, alpha=0.3), packed(ROWS), make_model(2)), made)


def test_tails_equal_trls(theirs):
    made = theirs(loss_type=["sigmoid"], beta=0.3, ld_alpha=0.4)
    close(ours(make_model(1), Dpo(beta=0.3, tail=0.4), packed(ROWS), make_model(2)), made)


def test_a_mixture_equals_trls(theirs):
    made = theirs(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.3)
    parts = (Dpo(beta=0.3), 0.8), (Bco(beta=0.3), 0.2), (Nll(per="token"), 1.0)
    mixture = Mixture(parts=tuple(Part(loss=loss, weight=weight) for loss, weight in parts))
    close(ours(make_model(1), mixture, packed(ROWS), make_model(2)), made)


def cpo_inputs(rows):
    """A padded batch as the trainers without a reference take it."""
    made = {}
    for place, side in ((1, "chosen"), (2, "rejected")):
        long = max(len(row[0]) + len(row[place]) for row in rows)
        texts = [[*row[0], *row[place]] for row in rows]
        made[f"{side}_input_ids"] = torch.tensor([text + [0] * (long - len(text)) for text in texts])
        made[f"{side}_attention_mask"] = torch.tensor([[1] * len(t) + [0] * (long - len(t)) for t in texts])
        labels = ([-100] * len(row[0]) + row[place] for row in rows)
        made[f"{side}_labels"] = torch.tensor([one + [-100] * (long - len(one)) for one in labels])
    return made


def without_reference(kind, folder, rows, **more):
    from datasets import Dataset
    from trl.experimental import cpo, orpo

    config, trainer = {"cpo": (cpo.CPOConfig, cpo.CPOTrainer), "orpo": (orpo.ORPOConfig, orpo.ORPOTrainer)}[kind]
    args = config(**settings(folder), max_length=64, **more)
    data = Dataset.from_list([TEXT])
    model = make_model(1)
    made = trainer(model=model, args=args, train_dataset=data, processing_class=make_tokenizer())
    loss = made.compute_loss(model, cpo_inputs(rows))
    loss.backward()
    return loss.item(), gradient(model)


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        (Cpo(beta=0.3, alpha=0.0, label_smoothing=0.1), {"label_smoothing": 0.1}),
        (Cpo(beta=0.3, alpha=0.0, variant="hinge"), {"loss_type": "hinge"}),
        (SimPo(beta=2.0, gamma=0.8), {"loss_type": "simpo", "simpo_gamma": 0.8}),
        (SimPo(beta=2.0, gamma=0.8, alpha=0.1), {"loss_type": "simpo", "simpo_gamma": 0.8, "alpha": 0.1}),
    ],
)
def test_losses_without_a_reference_equal_trls(tmp_path, loss, more):
    made = without_reference("cpo", tmp_path, ROWS, beta=loss.beta, cpo_alpha=0.0, **more)
    close(ours(make_model(1), loss, packed(ROWS)), made)


def test_cpo_with_its_likelihood_and_cpo_simpo_equal_trls(tmp_path):
    made = without_reference("cpo", tmp_path, EVEN, beta=0.3, cpo_alpha=0.7)
    close(ours(make_model(1), Cpo(beta=0.3, alpha=0.7), packed(EVEN)), made)
    made = without_reference("cpo", tmp_path, ROWS, beta=2.0, cpo_alpha=0.5, loss_type="simpo", simpo_gamma=0.5)
    both = Mixture(parts=(Part(loss=SimPo(beta=2.0, gamma=0.5)), Part(loss=Nll(per="token"), weight=0.5)))
    close(ours(make_model(1), both, packed(ROWS)), made)


def test_orpo_equals_trls(tmp_path):
    """Theirs counts the prompt's tokens among the likely ones: here a prompt has none that is predicted."""
    close(ours(make_model(1), Orpo(beta=0.3), packed(EVEN)), without_reference("orpo", tmp_path, EVEN, beta=0.3))
