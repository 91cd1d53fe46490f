"""The stepper's state: taken back, it goes on as if it had never stopped, on every device and with every optimizer."""

import pytest
import torch
from torch import nn

from llmkit.core.errors import ResourceError
from llmkit.core.types import LossSum
from llmkit.parallel.offload import Offload, Pinned
from llmkit.parallel.steps import Steps, Ways
from llmkit.parallel.team import norm
from llmkit.train.optim import Adafactor, AdamW, AdamW8bit, Apollo, Galore, Lion, Lion8bit, Muon, ScheduleFree, Sgd

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
NODES = {
    "adamw": AdamW(lr=1e-2),
    "adamw_8bit": AdamW8bit(lr=1e-2),
    "sgd": Sgd(lr=1e-2, nesterov=True),
    "sgd plain": Sgd(lr=1e-2, momentum=0.0),
    "muon": Muon(lr=1e-2, groups=[{"match": "norm*", "factor": 3.0}]),
    "adafactor": Adafactor(lr=1e-2),
    "lion": Lion(lr=1e-2),
    "lion_8bit": Lion8bit(lr=1e-2),
    "schedule_free": ScheduleFree(lr=1e-2, layer_decay=0.5),
    "galore": Galore(lr=1e-2, rank=8, every=2),
    "apollo": Apollo(lr=1e-2, rank=8, every=2),
}


class Tiny(nn.Module):
    """Embedding, layers and a norm; 8-bit moments begin at 4,096 values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(90, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 80), nn.Linear(80, 64)])
        self.norm = nn.LayerNorm(64)

    def forward(self, batch):
        hidden = self.embed_tokens(batch)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return self.norm(hidden) @ self.embed_tokens.weight.T


def stepper(node, device="cpu", ways=Ways()):
    model = Tiny().to(device)
    params = dict(model.named_parameters())
    return Steps(model, params, node.build(params, apart=ways.in_backward), ways)


def loss(scores, batch):
    chosen = torch.log_softmax(scores.float(), -1).gather(-1, batch.roll(1, -1)[..., None])
    return LossSum(-chosen.sum(), torch.tensor(float(batch.numel())), {})


def stepped(steps, seeds, clip=1.0):
    for seed in seeds:
        batch = torch.randint(90, (3, 5), generator=torch.Generator().manual_seed(seed))
        steps.rate(1.0)
        steps.accumulate([batch.to(next(iter(steps.params.values())).device)], loss, 15.0)
        steps.step(1.0, clip, steps.grad_norm())
    return steps


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", NODES)
def test_a_state_that_was_saved_goes_on_to_the_same_weights(name, device):
    if name in ("adamw_8bit", "lion", "lion_8bit"):
        pytest.importorskip("bitsandbytes")
    node = NODES[name]
    whole = stepped(stepper(node, device), range(6))
    half = stepped(stepper(node, device), range(3))
    saved = {key: value.to("cpu", copy=True) for key, value in half.state().items()}  # as a checkpoint holds it
    other = stepper(node, device)
    other.load(saved)
    for key, value in half.state().items():
        assert torch.equal(other.state()[key], value) and other.state()[key].dtype == value.dtype, key
    with other.averaged():  # an evaluation leaves no trace
        pass
    stepped(other, range(3, 6))
    assert not torch.equal(half.params["layers.0.weight"], whole.params["layers.0.weight"])  # the control
    assert other.state().keys() == whole.state().keys()
    for key, value in whole.state().items():
        assert torch.equal(other.state()[key], value), key


@pytest.mark.parametrize("name", NODES)
def test_updates_in_the_backward_pass_equal_those_after_it(name):
    """Bit for bit, and the state of one goes on as the other."""
    node, ways = NODES[name], Ways(in_backward=True)
    plain, early = stepped(stepper(node), range(4), clip=0.0), stepped(stepper(node, ways=ways), range(2))
    norms = early.grad_norm(), stepped(stepper(node), range(1)).grad_norm()
    assert norms[0] > 0 and norms[1] == 0.0  # of a step that was applied nothing is left but its norm
    assert all(p.grad is None for p in early.params.values())
    other = stepper(node, ways=ways)
    other.load({key: value.clone() for key, value in early.state().items()})
    stepped(other, range(2, 4))
    assert other.state().keys() == plain.state().keys()
    for key, value in plain.state().items():
        assert torch.equal(other.state()[key], value), key


def test_updates_in_the_backward_pass_take_one_micro_batch():
    steps, batch = stepper(NODES["adamw"], ways=Ways(in_backward=True)), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ResourceError, match="more than one micro-batch"):
        steps.accumulate([batch, batch], loss, 8.0)


def test_schedule_free_evaluates_the_average_and_goes_on_from_what_it_was():
    steps = stepped(stepper(NODES["schedule_free"]), range(5))
    part, p = steps.optimizer.parts[0], steps.params["layers.0.weight"]
    before, base = p.detach().clone(), part.state[p]["z"]
    with steps.averaged():
        average = (before - (1 - 0.9) * base) / 0.9  # y = (1 - beta1) z + beta1 x
        assert torch.allclose(p, average, atol=1e-6) and not torch.allclose(p, before, atol=1e-6)
    assert torch.equal(p, before)


class Host:
    """Stands in for the host's memory beside a device: counts what comes and goes."""

    def __init__(self):
        self.taken, self.given = 0, 0

    def take(self, tensor):
        self.taken += 1
        return tensor.clone()

    def give(self, held, device):
        self.given += 1
        return held.to(device)


def test_offloaded_activations_come_back_to_equal_gradients_and_weights_stay():
    node, host = NODES["sgd"], Host()
    plain = stepper(node)
    away = stepper(node, ways=Ways(offload=Offload(plain.params.values(), host, least=1)))
    away.ways.offload.weights = tuple(away.params.values())
    batch = torch.randint(90, (3, 5))
    for steps in (plain, away):
        steps.accumulate([batch], loss, 15.0)
    assert host.taken == host.given > 4 and away.ways.offload.moved >= 15 * (64 + 80) * 4
    held = sum(p.numel() for p in away.params.values()) * 4
    assert away.ways.offload.moved < held  # no weight went with them
    for name, p in plain.params.items():
        assert torch.equal(p.grad, away.params[name].grad), name
    small = Offload((), Host(), least=1 << 30)
    with small.keeping():
        (torch.ones(4, requires_grad=True) ** 2).sum().backward()
    assert not small.moved


@pytest.mark.gpu
def test_pinned_memory_gives_back_what_it_took():
    host, made = Pinned(), torch.randn(1000, 1000, device="cuda")
    held, copy = [host.take(made * n) for n in range(4)], made.clone()
    del made
    back = [host.give(one, copy.device) for one in held]
    assert all(torch.equal(one, copy * n) for n, one in enumerate(back)) and all(one.is_pinned() for one in held)


@pytest.mark.parametrize(("settings", "device"), [({"capturable": True}, "meta"), ({}, "cpu")])
def test_the_count_of_steps_lies_where_the_optimizer_reads_it(settings, device):
    layer = nn.Linear(2, 2, device="meta")
    params = dict(layer.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), **settings)
    steps = Steps(layer, params, optimizer)
    held = {f"param/{name}": torch.zeros(p.shape) for name, p in params.items()}
    steps.load(held | {f"optim/{name}/step": torch.tensor(3.0) for name in params})
    assert {optimizer.state[p]["step"].device.type for p in params.values()} == {device}


def test_the_norm_of_a_large_gradient_loses_no_digits():
    """As torch's own does on a CPU, which sums squares one after the other."""
    torch.manual_seed(0)
    made = torch.randn(5_000_001) * torch.rand(5_000_001).pow(4)
    p = torch.nn.Parameter(torch.empty_like(made))
    p.grad = made
    wanted = float(made.double().norm())
    assert abs(norm([p]) / wanted - 1) < 1e-6 < abs(float(torch.nn.utils.get_total_norm([made])) / wanted - 1)
