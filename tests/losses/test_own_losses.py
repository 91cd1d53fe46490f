"""Losses of the user's own: what is no loss is told in one line before anything is begun, with the way out."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from completions import drawing

from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.core.own import OwnError, begun
from llmkit.core.types import Batch, Entropic, LossSum
from llmkit.evals import summed
from llmkit.losses.node import Dft
from llmkit.losses.own_node import OwnPairs, OwnTokens
from llmkit.losses.own_policy_node import OwnPolicy
from llmkit.losses.policy_node import Dapo, Grpo
from llmkit.losses.preference_node import Mixture
from llmkit.losses.referred_node import Dpo
from llmkit.losses.sides import Sides

RATIO = "    r = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)\n"
DPO = f"import torch\ndef loss(policy, reference):\n{RATIO}    return -torch.nn.functional.logsigmoid(0.1 * r)\n"
GRPO = "import torch\ndef loss(drawn):\n    ratio = torch.exp(drawn.logps - drawn.old)\n"
GRPO += "    return -torch.minimum(ratio * drawn.advantages, ratio.clamp(0.8, 1.2) * drawn.advantages)\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def own(tmp_path):
    """A node of this class over this text, begun."""

    def made(cls, text, **more):
        (tmp_path / "my.py").write_text(text)
        node = cls(ref=f"{tmp_path}/my.py:loss", **more)
        begun(node, True, "loss.ref")
        return node

    return made


def pair_of(*, grad=True, count=5):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (-10 + torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.full((count,), 4.0, dtype=torch.float64)
    policy = Sides(chosen.requires_grad_(grad), rejected.requires_grad_(grad), tokens, tokens, chosen)
    return policy, Sides(chosen.detach() + 0.5, rejected.detach() - 0.2, tokens, tokens)


BROKEN = {
    "raise KeyError('no')": r"my.py:loss raised KeyError: 'no' \(.*/my.py:3\); fix: mend it",
    "exit(3)": "raised SystemExit: 3",
    "return LOSS.mean()": r"losses of shape \(\) for 8 {}s; fix: return one number for each {}, a tensor of \(8,\)",
    "return LOSS[:, None]": r"losses of shape \(8, 1\) for 8 {}s",
    "return LOSS * float('nan')": "gave nan on plain values; fix: let it give finite numbers",
    "return LOSS / 0": "gave -?inf on plain values",
    "return (LOSS * 0).sqrt()": "a gradient that is not finite",
    "return LOSS.detach()": "gave losses without a gradient; fix: make them of what it is given",
    "return LOSS * 0": "has no gradient with respect to",
    "return LOSS.long()": "gave losses of torch.int64",
    "return LOSS.tolist()": "gave losses that are list, no tensor",
    "pass": "gave losses that are NoneType",
    "return LOSS, 3": "gave int beside the losses; fix: return losses, or losses and a dict",
    "return LOSS, {'own': LOSS.mean()}": r"gave figure own of shape \(\) for 8",
    "return LOSS, {'step': LOSS}": "calls a figure 'step'; fix: give it a name",
}
KINDS = {
    "pair": (OwnPairs, "policy, reference", "(policy.chosen - policy.rejected)"),
    "token": (OwnPolicy, "drawn", "(drawn.logps * drawn.advantages)"),
    "token of a row": (OwnTokens, "logps", "(-logps)"),
}


@pytest.mark.parametrize("of", KINDS)
def test_a_broken_function_is_one_line_before_anything_is_begun(of, own):
    cls, given, loss = KINDS[of]
    for body, why in BROKEN.items():
        with pytest.raises(OwnError, match=why.replace("{}", of.partition(" ")[0])) as caught:
            own(cls, f"def loss({given}):\n    x = 1\n    {body.replace('LOSS', loss)}\n")
        assert "\n" not in str(caught.value) and caught.value.problems[0].key == "loss.ref" and caught.value.code == 2


def test_what_is_no_function_at_all(own, tmp_path):
    with pytest.raises(OwnError, match=r"fails as it is read: ZeroDivisionError: division by zero \(.*/my.py:1\)"):
        own(OwnPairs, "x = 1 / 0\ndef loss(): ...")
    assert not [name for name, one in sys.modules.items() if getattr(one, "__file__", None) == f"{tmp_path}/my.py"]
    with pytest.raises(OwnError, match="is int, and nothing to call; fix: name a function"):
        own(OwnPairs, "loss = int(3)")  # what reading alone does not tell
    with pytest.raises(OwnError, match=r"raised TypeError: loss\(\) takes 1 positional argument but 2 were given"):
        own(OwnPairs, "def loss(policy):\n    return policy.chosen")
    with pytest.raises(RecipeError, match="has no other; fix: name one of loss"):
        begun(OwnPairs(ref=f"{tmp_path}/my.py:other"), True, "loss.ref")
    with pytest.raises(RecipeError, match="'my' names no function of a file"):
        OwnPolicy(ref="my")


def test_nothing_runs_that_was_not_allowed(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "my.py").write_text(f"open({str(mark)!r}, 'w')\n{DPO}")
    node = OwnPairs(ref=f"{tmp_path}/my.py:loss")
    with pytest.raises(RecipeError, match="nobody allowed yet; fix: read it, then run once with --allow-python"):
        begun(node, False, "loss.ref")
    assert not mark.exists()
    begun(node, True, "loss.ref")
    assert mark.exists()
    with pytest.raises(OwnError, match="my.py:loss was not begun"):  # though it is allowed
        OwnPairs(ref=node.ref)(*pair_of())


def test_a_run_keeps_to_the_function_that_it_began_with(own, tmp_path):
    node, said = own(OwnPairs, DPO), pair_of()
    before = node(*said).losses
    (tmp_path / "my.py").write_text(DPO.replace("0.1", "0.7"))
    assert torch.equal(node(*said).losses, before)
    begun(node, True, "loss.ref")
    assert not torch.equal(node(*said).losses, before)


def test_what_it_gives_later_is_looked_at_each_time(own):
    node = own(
        OwnPairs, DPO + "    \n" + "plain = loss\ndef loss(p, r): return plain(p, r) if len(p.chosen) == 8 else 1\n"
    )
    with pytest.raises(OwnError, match="gave losses that are int"):
        node(*pair_of())
    assert not len(node(*pair_of(count=0)).losses)  # of no pairs it is not asked


def test_pairs_are_judged_as_by_ours_and_in_a_mixture(own):
    node, (policy, reference) = own(OwnPairs, DPO), pair_of()
    made, ours = node(policy, reference), Dpo(beta=0.1)(policy, reference)
    assert torch.equal(made.losses, ours.losses) and made.figures.keys() == ours.figures.keys()
    assert torch.equal(made.figures["accuracy"], ours.figures["accuracy"])
    assert torch.allclose(0.1 * made.figures["reward_margin"], ours.figures["reward_margin"])
    parts = [{"loss": "nll", "weight": 0.3}, {"loss": {"kind": "python", "ref": node.ref}, "weight": 2.0}]
    mixed = Mixture(parts=parts)
    assert mixed.needs_reference and not mixed.whole_step
    begun(mixed.parts[1].loss, False, "loss.parts.1.loss.ref")  # remembered
    found = mixed(policy, reference)
    assert torch.equal(found.figures["loss_1_python"], ours.losses)
    assert torch.allclose(found.losses, 0.3 * found.figures["loss_0_nll"] + 2 * ours.losses)


def test_figures_of_its_own_are_told(own):
    text = "def loss(policy, reference):\n    assert reference is None\n    each = policy.rejected - policy.chosen\n"
    node = own(
        OwnPairs, text + "    return each, {'reward_chosen': 2 * policy.chosen, 'gap': each}\n", needs_reference=False
    )
    policy, _ = pair_of()
    figures = node(policy, None).figures
    assert torch.equal(figures["reward_margin"], (2 * policy.chosen - policy.rejected).detach())
    assert torch.equal(figures["gap"], (policy.rejected - policy.chosen).detach())


@pytest.mark.parametrize("per, ours", [("answer", Grpo), ("token", Dapo)])
def test_tokens_are_weighed_as_by_ours(per, ours, own):
    drawn = drawing()
    clip = {"clip_high": 0.2} if per == "token" else {}
    node, ours = own(OwnPolicy, GRPO, per=per, beta=0.1, entropy=0.01), ours(beta=0.1, entropy=0.01, **clip)
    batch, _ = drawn.batch(behaviour=drawn.old - 0.1)
    found = []
    for loss in (node, ours):
        logps = drawn.logps.clone().requires_grad_()
        made = loss(Entropic(logps, drawn.entropy), batch)
        made.total.backward()
        found.append((made.total.detach(), made.count, logps.grad, made.extras["kl"][0], loss.count(3, 20.0)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_tokens_of_rows_are_weighed_as_by_ours(own):
    node = own(OwnTokens, "def loss(logps):\n    p = logps.detach().exp()\n    return -(p * logps), {'likely': p}\n")
    weights = torch.tensor([[0.0, 1.0, 0.5, 0.0, 2.0]])
    batch = Batch(weights.long(), weights.long(), weights.long(), weights, None, (0,))
    made, ours = (loss(torch.tensor([-1.0, -0.2, -3.0], requires_grad=True), batch) for loss in (node, Dft()))
    assert torch.equal(made.total, ours.total) and torch.equal(made.count, ours.count) and node.needs == Dft().needs
    assert torch.equal(made.extras["nll"][0], ours.extras["nll"][0]) and "likely" in made.extras


TAKEN = {
    "pair": ("reward_margin", "accuracy", "logps_chosen", "logps_rejected", "length_chosen", "bubble"),
    "token": ("ratio", "kl", "entropy", "importance", "reward", "loss_scale"),
    "token of a row": ("nll", "loss_scale", "bubble"),
}


@pytest.mark.parametrize("of", TAKEN)
def test_a_figure_takes_no_name_of_ours(of, own):
    cls, given, loss = KINDS[of]
    text = f"def loss({given}):\n    return {loss}, {{NAME: {loss}}}\n"
    for name in TAKEN[of]:
        with pytest.raises(OwnError, match=f"calls a figure '{name}'; fix: give it a name"):
            own(cls, text.replace("NAME", repr(name)))


def test_a_figure_may_be_called_as_what_we_are_given(own):
    names = ("policy", "losses", "chosen", "rejected", "more")
    said = ", ".join(f"'{name}': policy.chosen" for name in names)
    figures = own(OwnPairs, f"def loss(policy, reference):\n    return -policy.chosen, {{{said}}}\n")(
        *pair_of()
    ).figures
    assert all(torch.equal(figures[name], pair_of()[0].chosen.detach()) for name in names)


def test_figures_that_only_some_batches_have_are_summed(monkeypatch):
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    parts = [
        LossSum(one, one),
        LossSum(one, one, {"a": (two, one)}),
        LossSum(one, one, {"a": (one, two), "b": (two, two)}),
    ]
    left = iter(parts)
    monkeypatch.setattr(summed, "micro_batches", lambda *_: parts)
    monkeypatch.setattr(summed, "at_rest", nullcontext)
    subject = SimpleNamespace(packed=False, device="cpu", check=str, autocast=nullcontext, scored=str)
    found = summed.held_out_sums(subject, lambda *_: next(left), None, [], 8)
    assert found == {"valid.loss": 1.0, "valid.a": 1.0, "valid.b": 1.0, "valid.tokens": 3.0}


def test_what_memory_does_is_not_its_fault(own):
    text = "def loss(policy, reference):\n    raise MemoryError('out of memory')\n"
    with pytest.raises(MemoryError):
        own(OwnPairs, text)
    with pytest.raises(LlmkitError, match="own words"):
        own(OwnPairs, "from llmkit.core.errors import DataError\ndef loss(a, b): raise DataError('own words')\n")
