"""What is made of rewards: closed forms and what must change nothing."""

import numpy as np
import pytest
import torch

from llmkit.rl.advantages import ADVANTAGES, by_token, gae, priced, to_go, whitened, without_signal

GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])


def rewards(seed=0):
    return torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_is_its_formula():
    r = rewards()
    parts = [r[:4].numpy(), r[4:8].numpy(), r[8:].numpy()]

    def joined(rule):
        return torch.from_numpy(np.concatenate([rule(part) for part in parts]))

    std = r.std()
    want = {
        "group": joined(lambda x: (x - x.mean()) / (x.std(ddof=1) + 1e-4)),
        "centred": joined(lambda x: x - x.mean()),
        "batch": (r - r.mean()) / (std + 1e-4),
        "group_batch": joined(lambda x: x - x.mean()) / (std + 1e-4),
        "leave_one_out": joined(lambda x: np.array([x[i] - np.delete(x, i).mean() for i in range(len(x))])),
    }
    assert want.keys() == ADVANTAGES.keys()
    for name, rule in ADVANTAGES.items():
        torch.testing.assert_close(rule(r, GROUP), want[name])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_shift_changes_nothing_and_a_scale_nothing_where_deviations_divide(name):
    rule, r = ADVANTAGES[name], rewards()
    torch.testing.assert_close(rule(r + 5.0, GROUP), rule(r, GROUP))
    scaled = rule(1000 * r, GROUP)
    if name in ("centred", "leave_one_out"):
        torch.testing.assert_close(scaled, 1000 * rule(r, GROUP))
    else:
        torch.testing.assert_close(scaled, rule(r, GROUP), rtol=5e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["group", "centred", "group_batch", "leave_one_out"])
def test_another_groups_shift_changes_nothing(name):
    r = rewards()
    shifted = r + 3.0 * (GROUP == 1)
    made = ADVANTAGES[name](shifted, GROUP)
    if name == "group_batch":  # its deviation is the batch's
        made = made * (shifted.std() + 1e-4) / (r.std() + 1e-4)
    torch.testing.assert_close(made, ADVANTAGES[name](r, GROUP))


def test_equal_rewards_say_nothing():
    r = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 1, 2, 2])
    assert without_signal(r, GROUP).tolist() == [True, False, True]
    for rule in (ADVANTAGES["group"], ADVANTAGES["leave_one_out"]):
        assert rule(r, GROUP)[[0, 1, 2, 3, 8, 9]].abs().max() == 0
        assert float(rule(torch.tensor([3.0]), torch.tensor([0]))) == 0


OF = torch.tensor([0, 0, 0, 1, 2, 2])


def test_prices_are_of_completions_or_of_what_is_still_to_come():
    r, price = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.4, 0.5, -1.0, 1.5])
    torch.testing.assert_close(priced(r, price, OF), torch.tensor([0.3, 1.5, 2.5]))
    torch.testing.assert_close(to_go(r, price, OF), torch.tensor([0.3, 0.4, 0.6, 1.5, 2.5, 1.5]))
    torch.testing.assert_close(by_token(r, price, OF), torch.tensor([-0.1, -0.2, 0.6, 1.5, 1.0, 1.5]))
    assert float(priced(r, price, OF)[0]) == pytest.approx(float(to_go(r, price, OF)[0]))


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_generalised_advantages_equal_their_closed_form(discount, decay):
    g = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 6, generator=g, dtype=torch.float64)
    made, returns = gae(reward, value, OF, discount, decay)
    want = []
    for k in range(3):
        mine = torch.eq(OF, k)
        r, v = reward[mine].tolist(), [*value[mine].tolist(), 0.0]
        gap = [r[t] + discount * v[t + 1] - v[t] for t in range(len(r))]
        want += [sum((discount * decay) ** (s - t) * gap[s] for s in range(t, len(r))) for t in range(len(r))]
    torch.testing.assert_close(made, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(returns, made + value)
    if decay == discount == 1.0:
        torch.testing.assert_close(returns[:3], reward[:3].flip(0).cumsum(0).flip(0))


def test_whitening_has_mean_0_and_deviation_1():
    x = 3 + 5 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    made, kept = whitened(x), whitened(x, centre=False)
    assert float(made.mean()) == pytest.approx(0, abs=1e-5)
    assert float(made.std()) == pytest.approx(1, abs=1e-3)
    assert float(kept.mean()) == pytest.approx(float(x.mean()), abs=1e-4)
    assert float(whitened(torch.ones(1))) == 0
