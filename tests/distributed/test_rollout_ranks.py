"""Rollouts over ranks that each hold a part of the model: they are those of one process."""

import gc
import json
from functools import partial

import pytest
import torch
import torch.distributed as dist

from llmkit import run
from llmkit.parallel.chunks import Route
from llmkit.stages import drawing
from llmkit.stages.policy import Policy
from tests.distributed import QUIET, lines, together, trained
from tests.distributed.test_chunks import held as tensors

WAYS = {
    "fsdp": (2, {"strategy": "fsdp"}),
    "zero 1": (2, {"strategy": {"kind": "zero", "stage": 1}}),
    "zero 2": (2, {"strategy": {"kind": "zero", "stage": 2}}),
    "zero 3": (2, {"strategy": {"kind": "zero", "stage": 3}}),
    "zero 3, alone": (1, {"strategy": {"kind": "zero", "stage": 3}}),
    "copies": (2, {"strategy": "fsdp", "shard": 1}),
    "tensor": (2, {"tensor": 2}),
    "hybrid": (4, {"strategy": "fsdp", "replicate": 2, "shard": 2}),
    "tensor, fsdp": (4, {"strategy": "fsdp", "tensor": 2}),
}
KINDS, SHAPE = (torch.Tensor, torch.nn.Parameter), (448, 32)
"""Of the tiny model's embeddings."""
FAST = (("lora", "fsdp"), ("none", "fsdp"))


def maker(model, place, kind=Policy, **more):
    path = place / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i} of the model"}) + "\n" for i in range(8)))

    def make(out, **spread):
        options = {
            "data": {"train": [{"kind": "jsonl", "path": str(path)}], "max_length": 48},
            "rollout": {"group": 4, "max_tokens": 5},
            "reward": [{"kind": "length", "shape": {"kind": "target", "length": 4, "slack": 24}, "unit": "characters"}],
            "loss": {"kind": "dapo"},
            "batch": {"prompts": 3},
            "micro_batch": 1,
            "steps": 3,
            "optim": {"kind": "sgd", "lr": 1e-1},
            "schedule": {"kind": "constant"},
        }
        return kind(**({"model": str(model), "out": str(out)} | options | more | spread))

    return make


def answers(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


NAMES = ("loss", "grad_norm", "reward", "entropy", "length", "ratio", "groups_without_signal")


def same(several, one, names=NAMES):
    assert [line["ids"] for line in answers(several)] == [line["ids"] for line in answers(one)]
    assert [line["version"] for line in answers(several)] == [line["version"] for line in answers(one)]
    for mine, theirs in zip(lines(several), lines(one), strict=True):
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("adapter", "way"),
    [
        pytest.param(adapter, way, marks=() if (adapter, way) in FAST else pytest.mark.slow)
        for adapter in ("lora", "none")
        for way in WAYS
    ],
)
def test_parts_draw_as_one_process(adapter, way, tiny, tmp_path):
    world, parallel = WAYS[way]
    more = {"adapter": {"kind": "lora", "rank": 4}, "loss": {"kind": "dapo", "beta": 0.1}}
    make = maker(tiny, tmp_path, **(more if adapter == "lora" else {"adapter": "none"}))
    one = trained(1, make, tmp_path, "run")
    several = tmp_path / "several"
    together(world, lambda _: run(make(several, parallel=parallel), console=QUIET), tmp_path, 200.0)
    same(several, one)


def test_the_model_is_never_there_twice(tiny, tmp_path):
    """A rank has its part, and one whole copy; while weights move nothing is beside these but messages."""
    make = maker(tiny, tmp_path, adapter="none", parallel={"strategy": "fsdp"}, steps=2)

    def work(rank):
        gc.collect()
        gc.freeze()  # what other tests have left is not counted
        real, begin, before, sent = Route.follow, [], [], []

        def follow(self, lying, into, *more):
            gc.collect()
            begin.append(whole_matrices())
            before.append(tensors())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "broadcast", broadcast)
                real(self, lying, into, *more)

        def broadcast(room, *more, **named):
            passed(room, *more, **named)
            sent.append(tensors() - before[-1])

        def whole_matrices():
            held = [one for one in gc.get_objects() if type(one) in KINDS and one.shape == SHAPE]
            return {one.data_ptr() for one in held if one.untyped_storage().nbytes()}

        passed = dist.broadcast
        Route.follow, drawing.Route = follow, partial(Route, most=4 << 10)
        run(make(tmp_path / "run"), console=QUIET)
        assert len(sent) > 40
        assert max(sent) <= 2 * (4 << 10)
        assert [len(one) for one in begin] == [1, 1]

    together(2, work, tmp_path)
