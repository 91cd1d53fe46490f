"""Optimizers, precision and memory in whole runs: exact resume, contradictions, and what a device must have."""

import json
import math
import signal

import pytest
import torch

from llmkit.build import float8, training
from llmkit.checkpoint import state
from llmkit.core.errors import LlmkitError, ModelError, RecipeError, ResourceError
from llmkit.core.run import Grants
from llmkit.parallel.scaler import Scaler
from llmkit.parallel.steps import Steps
from llmkit.stages.needs import check_needs
from tests.faults import TIMINGS, go, in_child, killed_after, sft, whole

LEVERS = {
    "schedule_free": {"optim": {"kind": "schedule_free", "lr": 1e-2}, "schedule": {"kind": "constant", "warmup": 2}},
    "muon": {"optim": {"kind": "muon", "layer_decay": 0.9, "groups": [{"match": "*embed*", "factor": 0.1}]}},
    "apollo": {"optim": {"kind": "apollo", "rank": 4, "every": 2}},
    "galore": {"optim": {"kind": "galore", "rank": 4, "every": 3}},
    "lion": {"optim": {"kind": "lion_8bit"}},
    "adafactor": {"optim": {"kind": "adafactor"}},
    "fp16": {"precision": {"params": "fp32", "compute": "fp16"}},
    "in backward": {"optim": {"kind": "adamw", "clip": 0}, "memory": {"optimizer_in_backward": True}},
    "selective": {"memory": {"recompute": "selective"}, "adapter": {"kind": "lora", "rank": 2, "dropout": 0.1}},
}


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    return whole(tiny, tmp_path_factory.mktemp("levers"))[0]


def node(tiny, rows, out, **more):
    options = {"adapter": "none", "micro_batch": "auto", "evaluate": {"every": 3, "rows": 4, "samples": 0}}
    return sft(tiny, rows, out, **(options | more))


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in found]


@pytest.mark.parametrize("name", LEVERS)
def test_a_killed_run_ends_as_if_it_had_not_been(name, tiny, rows, tmp_path):
    def made(out):
        return node(tiny, rows, tmp_path / out, **LEVERS[name])

    go(made("whole"))
    assert in_child(lambda: killed_after(4, lambda: go(made("killed")))) == -signal.SIGKILL
    go(made("killed"))
    ends = [state.load(tmp_path / out / "checkpoints" / "step-6")[0] for out in ("whole", "killed")]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 10
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")
    losses = [line["valid.loss"] for line in lines(tmp_path / "whole") if line["event"] == "evaluate"]
    assert losses[-1] < losses[0]


def test_updates_in_the_backward_pass_are_those_after_it(tiny, rows, tmp_path):
    optim = {"kind": "adamw", "lr": 1e-3, "clip": 0}
    early = node(tiny, rows, tmp_path / "early", optim=optim, memory={"optimizer_in_backward": True})
    plain = node(tiny, rows, tmp_path / "plain", optim=optim, micro_batch=8)
    ends = []
    for one in (early, plain):
        go(one)
        ends.append(state.load(tmp_path / one.out / "checkpoints" / "step-6")[0])
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    found, other = lines(tmp_path / "early"), lines(tmp_path / "plain")
    assert [line.get("loss") for line in found] == [line.get("loss") for line in other]
    for one, two in zip(found, other, strict=True):
        assert one.get("grad_norm", 0.0) == pytest.approx(two.get("grad_norm", 0.0), rel=1e-5)


def test_schedule_free_leaves_the_averaged_weights(tiny, rows, tmp_path):
    """The model that it leaves scores as its last evaluation did, and its checkpoint holds other weights."""
    from safetensors.torch import load_file

    artifact = go(node(tiny, rows, tmp_path / "run", **LEVERS["schedule_free"]))
    left = load_file(artifact.model() / "model.safetensors")
    held = state.load(tmp_path / "run" / "checkpoints" / "step-6")[0]
    for key in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        base, now = held[f"optim/{key}/z"], held[f"param/{key}"]
        assert torch.allclose(left[key], (now - 0.1 * base) / 0.9, atol=1e-6), key
        assert not torch.allclose(left[key], now, atol=1e-6)


@pytest.mark.parametrize("first", [{"kind": "adamw"}, {"kind": "galore", "rank": 8}], ids=lambda first: first["kind"])
def test_another_optimizer_that_is_accepted_begins_anew(first, tiny, rows, tmp_path, capfd):
    out = tmp_path / "run"
    assert in_child(lambda: killed_after(4, lambda: go(node(tiny, rows, out, optim=first)))) == -signal.SIGKILL
    other = node(tiny, rows, out, optim={"kind": "galore", "rank": 4})
    with pytest.raises(RecipeError, match=r"recipe\.optim"):
        go(other)
    go(other, grants=Grants(accept=("optim",)))
    assert "another optimizer: its state begins anew" in capfd.readouterr().err
    held = state.load(out / "checkpoints" / "step-6")[0]
    assert float(held["optim/model.norm.weight/step"]) == 2.0  # of the steps 5 and 6
    assert int(held["optim/model.layers.0.mlp.up_proj.weight/count:int"]) == 2


def test_a_forced_overflow_skips_a_step_halves_the_factor_and_goes_on(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Scaler", lambda: Scaler(2.0**22))
    go(node(tiny, rows, tmp_path / "run", precision="fp16_mixed", checkpoint={"every": 1, "keep": 20}, steps=14))
    found = [line for line in lines(tmp_path / "run") if line["event"] == "train"]
    skipped = [line for line in found if "skipped" in line]
    assert 1 <= len(skipped) < 14 and [line["step"] for line in skipped] == list(range(1, len(skipped) + 1))
    assert all(math.isfinite(line["loss"]) and not math.isfinite(float(line["grad_norm"])) for line in skipped)
    scales = [line["loss_scale"] for line in found]
    assert scales == [2.0 ** (22 - min(n, len(skipped))) for n in range(14)]
    ends = [state.load(tmp_path / "run" / "checkpoints" / f"step-{n}")[0] for n in (1, len(skipped) + 1)]
    start = [key for key in ends[0] if key.startswith("optim/")]
    assert not start and any(key.startswith("optim/") for key in ends[1])  # the optimizer was not touched
    assert float(ends[0]["scaler/scale"]) == 2.0**21 and float(ends[1]["scaler/scale"]) == scales[-1]


def test_t1_an_overflow_streak_stops_with_the_lever(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Scaler", lambda: Scaler(1.0))
    real = Steps.grad_norm
    monkeypatch.setattr(Steps, "grad_norm", lambda self: real(self) * math.inf)
    with pytest.raises(ResourceError, match="precision: gradients overflow in fp16.*set precision=bf16_mixed"):
        go(node(tiny, rows, tmp_path / "run", precision="fp16_mixed", guard={"nonfinite": "skip"}))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_the_gap_to_fp32_stays_small_over_200_steps(tiny, rows, tmp_path):
    losses = {}
    for name in ("fp32", "bf16_mixed", "fp16_mixed"):
        more = {"steps": 200, "batch": {"rows": 2}, "optim": {"kind": "adamw", "lr": 1e-3}, "checkpoint": {}}
        go(node(tiny, rows, tmp_path / name, precision=name, evaluate={"rows": 1, "samples": 0}, **more))
        losses[name] = [line["loss"] for line in lines(tmp_path / name) if line["event"] == "train"]
    for name in ("bf16_mixed", "fp16_mixed"):
        gaps = [abs(a - b) for a, b in zip(losses["fp32"], losses[name], strict=True)]
        assert max(gaps) <= 0.05 and sum(gaps) > 0, name
    assert losses["fp32"][-1] < losses["fp32"][0] - 2


CONFLICTS = {
    "schedule.kind: contradicts optim.kind: schedule_free averages": {"optim": {"kind": "schedule_free"}},
    "precision: contradicts adapter.kind: fp8": {"precision": "fp8", "adapter": {"kind": "lora"}},
    "precision.compute: contradicts precision.params": {"precision": {"params": "bf16", "compute": "fp16"}},
    "optim.clip: contradicts memory.optimizer_in_backward": {"memory": {"optimizer_in_backward": True}},
    "guard.nonfinite: contradicts memory.optimizer_in_backward": {
        "memory": {"optimizer_in_backward": True},
        "guard": {"nonfinite": "skip"},
    },
    "precision: contradicts memory.optimizer_in_backward": {
        "memory": {"optimizer_in_backward": True},
        "precision": "fp16_mixed",
    },
    "micro_batch: contradicts memory.optimizer_in_backward: 8 rows a step": {
        "memory": {"optimizer_in_backward": True},
        "micro_batch": 2,
    },
}


@pytest.mark.parametrize("said", CONFLICTS)
def test_contradictions_name_both_keys(said, tiny):
    with pytest.raises(RecipeError) as caught:
        node(tiny, "r.jsonl", "out", **CONFLICTS[said])
    assert any(str(problem).startswith(said) for problem in caught.value.problems), caught.value


NEEDS = {
    "optim.kind: paged_adamw_8bit needs a cuda device": {"optim": {"kind": "paged_adamw_8bit"}},
    "memory.offload_activations: there is no device to move": {"memory": {"offload_activations": True}},
    "precision: fp8 needs a CUDA device of capability 8.9": {"precision": "fp8"},
}


@pytest.mark.parametrize("said", NEEDS)
def test_what_the_device_lacks_is_told_before_anything_is_made(said, tiny, rows, tmp_path):
    with pytest.raises(ResourceError) as caught:
        go(node(tiny, rows, tmp_path / "run", **NEEDS[said]))
    assert str(caught.value).startswith(said) and not (tmp_path / "run").exists()


def test_a_missing_package_is_named_with_the_way_to_it(tiny, rows, tmp_path, monkeypatch):
    for package, options in (
        ("schedulefree", LEVERS["schedule_free"]),
        ("bitsandbytes", {"optim": {"kind": "lion"}}),
    ):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ModelError, match=f"optim.kind: .* needs .*{package}.*fix: pip install {package}"):
            go(node(tiny, rows, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(ModelError, match="precision: fp8 needs torchao .*pip install torchao"):
        float8.check("cuda", (9, 0))
    with pytest.raises(ResourceError, match="this one is 8.0"):
        float8.check("cuda", (8, 0))
    check_needs(node(tiny, rows, tmp_path / "run"), "cpu")


def test_a_group_that_matches_nothing_is_told_with_near_names(tiny, rows, tmp_path):
    with pytest.raises(RecipeError, match=r"optim\.groups\.0\.match: \*q_prjo\* matches none of .*q_proj"):
        go(node(tiny, rows, tmp_path / "run", optim={"kind": "adamw", "groups": [{"match": "*q_prjo*", "lr": 1.0}]}))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_all_that_a_device_cannot_do_is_told_at_once(tiny, rows, tmp_path):
    asked = {"optim": "paged_adamw_8bit", "model": {"name": str(tiny), "attention": "flash"}}
    with pytest.raises(LlmkitError) as caught:
        check_needs(sft(tiny, rows, tmp_path, **asked), "cpu")
    assert [problem.key for problem in caught.value.problems] == ["optim.kind", "model.attention"]
