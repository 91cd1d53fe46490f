"""Losses over policies and advantages equal TRL's trainers on the same batch (trl 1.16)."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from llmkit.core.types import Entropic
from llmkit.losses.policy_node import Cispo, Dapo, DrGrpo, Grpo, Gspo, Rloo
from tests.losses.completions import drawing

pytestmark = pytest.mark.slow  # to import TRL's trainers alone takes seconds


class Alone:
    """One process."""

    num_processes = 1
    sync_gradients = True

    def reduce(self, x, reduction):
        return x

    def gather(self, x):
        return x

    gather_for_metrics = gather


def theirs(made, logps, entropy, **said):
    """TRL's loss of the whole batch as one accumulation step."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    trainer = RLOOTrainer if said.pop("rloo", False) else GRPOTrainer
    padded = made.padded
    inputs = {
        "prompt_ids": torch.zeros(len(made.lengths), 2).long(),
        "prompt_mask": torch.ones(len(made.lengths), 2).long(),
        "completion_ids": torch.zeros(made.mask.shape).long(),
        "completion_mask": made.mask.long(),
        "advantages": made.advantages,
        "old_per_token_logps": padded(made.old),
        "ref_per_token_logps": padded(made.reference),
        "old_logps": padded(made.old).sum(1),
        "num_items_in_batch": made.mask.sum(),
    }
    if "behaviour" in said:
        gap = padded(made.old - said.pop("behaviour"))
        inputs["importance_sampling_ratio"] = gap.exp().clamp_max(2.0)
    args = SimpleNamespace(use_bias_correction_kl=said.pop("corrected", True), delta=None, steps_per_generation=1)
    known = {
        "_get_per_token_logps_and_entropies": lambda *a, **k: (padded(logps), padded(entropy), None),
        "model": SimpleNamespace(training=True),
        "args": args,
        "accelerator": Alone(),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "loss_type": "grpo",
        "use_vllm": "importance_sampling_ratio" in inputs,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 16,
        "_entropy_bonus_enabled": bool(said.get("entropy_coef")),
        "use_adaptive_entropy": False,
        "_metrics": {"train": defaultdict(list)},
    }
    self = SimpleNamespace(**(known | said))
    return trainer._compute_loss(self, SimpleNamespace(training=True), inputs), self._metrics["train"]


CASES = {
    "grpo": (Grpo(), {}),
    "grpo with a price": (Grpo(beta=0.1), {"beta": 0.1}),
    "grpo as it was": (Grpo(beta=0.1, kl_corrected=False), {"beta": 0.1, "corrected": False}),
    "dr_grpo": (DrGrpo(length=16, beta=0.1), {"loss_type": "dr_grpo", "beta": 0.1}),
    "dapo": (Dapo(), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo with a bonus": (Dapo(entropy=0.05), {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.05}),
    "gspo": (  # TRL corrects by the ratio of the completion here, which is the gradient of no divergence
        Gspo(clip=0.02, clip_high=0.03, beta=0.1, kl_corrected=False),
        {
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.02,
            "epsilon_high": 0.03,
            "beta": 0.1,
            "corrected": False,
        },
    ),
    "cispo": (Cispo(most=1.2, beta=0.1), {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.1}),
    "rloo": (Rloo(), {"rloo": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_gradient_and_figures_equal_trls(case, seed):
    pytest.importorskip("trl")
    node, said = CASES[case]
    made = drawing(seed, completions=8, dtype=torch.float32)
    leaves = [[x.clone().requires_grad_() for x in (made.logps, made.entropy)] for _ in range(2)]
    want, metrics = theirs(made, *leaves[1], **said)
    sums = node(Entropic(*leaves[0]), made.batch()[0])
    got = sums.total / sums.count
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    ours, meant = (torch.autograd.grad(x, y, allow_unused=True) for x, y in zip((got, want), leaves, strict=True))
    for a, b in zip(ours, meant, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    figures = {"entropy": "entropy"} | ({"clipped": "clip_ratio/region_mean"} if node.ratio == "token" else {})
    figures |= {} if node.kind == "cispo" else {"kl": "kl"} if "as it was" in case else {}
    for name, key in figures.items():
        if key in metrics:
            top, bottom = sums.extras[name]
            assert float(top) / float(bottom) == pytest.approx(metrics[key][0], rel=1e-5, abs=1e-7)


def test_weights_of_another_laws_tokens_equal_trls():
    pytest.importorskip("trl")
    made = drawing(2, completions=8, spread=0.5, dtype=torch.float32)
    behaviour = made.old - 0.9 * made.entropy + 0.3
    want, _ = theirs(made, made.logps, made.entropy, loss_type="dapo", epsilon_high=0.28, behaviour=behaviour)
    sums = Dapo(truncate=2.0)(Entropic(made.logps, made.entropy), made.batch(behaviour=behaviour)[0])
    assert (made.old - behaviour).exp().max() > 2
    torch.testing.assert_close(sums.total / sums.count, want, rtol=1e-5, atol=1e-6)
