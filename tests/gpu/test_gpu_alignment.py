"""Whole alignment stages on a device: losses of pairs and of students are those of the CPU, policies begin at
themselves and move, interrupted runs end alike, and what is drawn beside a step is what would be drawn without it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from llmkit import Artifact
from llmkit.recipe import execute
from llmkit.stages import build_training
from llmkit.stages.ahead import Ahead
from tests.conftest import make_model, make_tokenizer
from tests.gpu.conftest import placed
from tests.stages.drawn import LETTER, ROWS, go, lines_of, policy, steps_of, written
from tests.stages.test_distill import node as distill
from tests.stages.test_ppo import CRITICS, ppo
from tests.stages.test_preference import preference
from tests.stages.test_reward import reward
from tests.stages.test_unpaired import kto

WORDS = ["the", "quick", "fox", "jumps", "over", "lazy", "model", "text"]
CLOSE = 5e-5
"""Of a figure: the order of sums differs from device to device."""
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.0}
FULL = {"adapter": "none"}
Make = Callable[..., Any]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A file of prompts."""
    return written(tmp_path / "asked.jsonl", ROWS)


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Path]:
    """Files of pairs, of single answers that are good or bad, of solutions in steps, and of answers."""
    dice, found = np.random.default_rng(0), dict[str, list[dict[str, Any]]]()

    def said(word: str, most: int) -> str:
        return " ".join([word, *dice.choice(WORDS, dice.integers(0, most))])

    for at in range(24):
        prompt, good, bad = said("hello", 9), said("dog", 6), said("brown", 6)
        chat = [{"role": "user", "content": prompt}]
        sides = {"chosen": good, "rejected": bad}
        pair = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
        found.setdefault("pairs", []).append({"prompt": chat, **pair})
        one = {"prompt": chat, "completion": pair["chosen" if at % 3 else "rejected"], "label": bool(at % 3)}
        found.setdefault("single", []).append(one)
        steps = {"prompt": f"{prompt} {at}\n", "completions": [good, bad], "labels": [True, False]}
        found.setdefault("steps", []).append(steps)
        found.setdefault("answers", []).append({"prompt": prompt, "completion": f" {good}"})
    return {name: written(tmp_path / f"{name}.jsonl", held) for name, held in found.items()}


ALIKE: dict[str, tuple[Make, str, dict[str, Any]]] = {
    "dpo": (preference, "pairs", {}),
    "dpo, a prompt each": (preference, "pairs", {"share_prompts": False}),
    "dpo, unpacked": (preference, "pairs", {"data": {"packing": "none"}}),
    "dpo, precomputed": (preference, "pairs", {"reference": "precomputed", **FULL}),
    "dpo, a second model": (preference, "pairs", {"reference": "model", **FULL}),
    "dpo, recompute": (preference, "pairs", {"memory": {"recompute": "full"}}),
    "ipo": (preference, "pairs", {"loss": {"kind": "ipo"}}),
    "simpo": (preference, "pairs", {"loss": {"kind": "simpo"}}),
    "orpo": (preference, "pairs", {"loss": {"kind": "orpo"}}),
    "aot": (preference, "pairs", {"loss": {"kind": "aot"}}),
    "kto": (kto, "single", {}),
    "reward": (reward, "pairs", {"steps": 4, "loss": {"kind": "bradley_terry", "center": 0.01}}),
    "distill": (distill, "answers", {"steps": 4}),
    "distill, jsd, cached": (distill, "answers", {"steps": 4, "loss": "jsd", "cached": {"top_k": 16}}),
    "distill, reverse": (distill, "answers", {"steps": 4, "loss": "reverse_kl", "cross_entropy": 0.2}),
}


PROCESS = {"task": "process", "loss": "focal"}
"""Its head has dropout, which draws otherwise on another device."""


def made_of(case: str, tiny: Path, rows: dict[str, Path], out: Path, **more: Any) -> Any:
    """The stage of a case."""
    make, name, own = {**ALIKE, "reward, process": (reward, "steps", PROCESS)}[case]
    given = (other(out.parent), tiny) if make is distill else (tiny,)
    return make(*given, rows[name], out, **json.loads(json.dumps(own)) | more)


def other(folder: Path) -> Path:
    """A teacher whose law depends on its text."""
    if not (folder / "teacher").exists():
        make_model(3, initializer_range=0.15).save_pretrained(folder / "teacher")
        make_tokenizer().save_pretrained(folder / "teacher")
    return folder / "teacher"


@pytest.mark.parametrize("case", ALIKE)
def test_steps_in_fp32_are_those_of_the_cpu(
    case: str, gpu: str, tiny: Path, rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned and what is measured of held-out rows, by SGD, which keeps small differences small."""
    seen = []
    for where in (gpu, "cpu"):
        monkeypatch.setattr(execute, "device", lambda where=where: where)
        more: dict[str, Any] = {"precision": "fp32", "optim": SGD, "evaluate": {}}
        seen.append(lines_of(go(made_of(case, tiny, rows, tmp_path / where, **more)).folder))
    assert len(seen[0]) == len(seen[1]) > 4
    for ours, theirs in zip(*seen, strict=True):
        assert ours.keys() == theirs.keys()
        level = theirs.get("reward_margin") == 0  # of models that are equal a rounding says which answer is better
        for name in (key for key, value in theirs.items() if isinstance(value, float)):
            if level and name == "accuracy":
                continue
            assert ours[name] == pytest.approx(theirs[name], rel=CLOSE, abs=CLOSE), (ours["step"], name)


@pytest.mark.parametrize("precision", ["bf16_mixed", "bf16"])
@pytest.mark.parametrize("case", ["dpo", "dpo, precomputed", "ipo", "kto", "reward", "reward, process", "distill"])
def test_it_learns_in_16_bits(
    case: str, precision: str, gpu: str, tiny: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"precision": precision, "steps": 12, "evaluate": {}, "optim": {"kind": "adamw", "lr": 1e-2}}
    artifact = go(made_of(case, tiny, rows, tmp_path / "run", **more))
    found = [line["valid.loss"] for line in lines_of(artifact.folder) if line["event"] == "evaluate"]
    assert found[-1] < (0.999 if case == "reward, process" else 0.95) * found[0], found
    artifact.verify()


ONES = {"group": 4, "max_tokens": 6}
TWICE = ONES | {"reuse": 2}
DRAWN: dict[str, tuple[Make, dict[str, Any]]] = {
    "grpo": (policy, {"loss": {"kind": "grpo", "beta": 0.1}}),
    "grpo, used twice": (policy, {"loss": {"kind": "grpo", "beta": 0.1}, "rollout": TWICE}),
    "grpo, every weight": (policy, {"loss": {"kind": "grpo"}, "rollout": TWICE, **FULL}),
    "grpo, a second model": (policy, {"loss": {"kind": "grpo", "beta": 0.1}, "reference": "model", **FULL}),
    "dapo": (policy, {"loss": {"kind": "dapo", "beta": 0.05}, "rollout": TWICE | {"redraw": 2}}),
    "gspo": (policy, {"loss": {"kind": "gspo", "beta": 0.05, "entropy": 0.01}, "rollout": TWICE}),
    "cispo": (policy, {"loss": {"kind": "cispo"}, "rollout": TWICE | {"parts": 3}}),
    "reinforce": (policy, {"loss": {"kind": "reinforce", "beta": 0.1, "penalty": "reward"}}),
    "drawn ahead": (policy, {"loss": {"kind": "grpo", "beta": 0.1}, "rollout": TWICE | {"asynchronous": 1}}),
    "recompute": (policy, {"rollout": TWICE, "memory": {"recompute": "full"}}),
    "ppo": (ppo, {"critic": CRITICS["of the policy's states"], "kl": {"kind": "adaptive", "horizon": 8}}),
    "ppo, over the base": (ppo, {"critic": CRITICS["over the base"]}),
    "ppo, a critic of its own": (ppo, {"critic": CRITICS["a model"]}),
    "ppo, every weight": (ppo, {"reference": "model", **FULL}),
}
HERE = ("grpo", "fp32")
"""What the CPU tries; tests/stages has the others."""


@pytest.mark.parametrize(
    ("case", "precision", "device"),
    placed(product(DRAWN, ("fp32", "bf16_mixed", "bf16")), lambda *case: case == HERE),
    indirect=["device"],
)
def test_a_policy_begins_at_itself_and_moves(
    case: str, precision: str, device: str, tiny: Path, asked: Path, tmp_path: Path
) -> None:
    make, more = DRAWN[case]
    artifact = go(make(tiny, asked, tmp_path / "run", **{"precision": precision, "reward": [LETTER]} | more))
    artifact.verify()
    steps, short = steps_of(artifact.folder), precision != "fp32"
    first, used = steps[0], make is ppo or "reuse" in more.get("rollout", {})
    assert all(math.isfinite(value) for line in steps for value in line.values() if isinstance(value, float))
    assert first["ratio"] == pytest.approx(1, abs=5e-3 if short else 1e-6)
    assert first["engine_gap"] < (0.05 if short else 1e-4)
    assert not used or any(line["ratio"] != 1.0 for line in steps[1:])
    if first.get("kl") is not None:
        assert first["kl"] == pytest.approx(0, abs=1e-3 if short else 1e-9)
    moved(artifact, tiny, make is ppo)


def moved(artifact: Artifact, tiny: Path, critic: bool) -> None:
    """What is trained is no more what it was."""
    files = [*artifact.model().glob("*.safetensors"), *(artifact.folder.glob("critic/*.safetensors") if critic else [])]
    assert len(files) >= 1 + critic
    before = load_file(tiny / "model.safetensors")
    for file in files:
        held = load_file(file)
        now = {name: p.float() for name, p in held.items() if "lora_B" in name or file.name == "value_head.safetensors"}
        now |= {name: p.float() - before[name] for name, p in held.items() if name in before}
        assert now and max(float(p.abs().max()) for p in now.values()) > 0, file


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_a_policy_learns_what_it_is_paid_for(precision: str, gpu: str, tiny: Path, asked: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"steps": 12, "rollout": {"group": 16, "max_tokens": 4}, "batch": {"prompts": 4}, **FULL}
    more |= {"optim": {"kind": "adamw", "lr": 1.5e-2}, "reward": [LETTER], "precision": precision}
    rewards = [line["reward"] for line in steps_of(go(policy(tiny, asked, tmp_path / "run", **more)).folder)]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 1.0, rewards


EXACT = {"deterministic": True, "checkpoint": {"every": 3, "keep": 9}, "steps": 5}


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
@pytest.mark.parametrize("case", ["grpo, used twice", "drawn ahead", "ppo, over the base", "ppo, a critic of its own"])
def test_an_interrupted_run_ends_alike_to_the_bit(
    case: str, precision: str, gpu: str, tiny: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, more = DRAWN[case]
    nodes = [make(tiny, asked, tmp_path / name, **more | EXACT, precision=precision) for name in ("whole", "part")]
    whole, show = go(nodes[0]), build_training.show

    def interrupted(job: Any, line: Any) -> None:
        show(job, line)
        if line["event"] == "train" and line["step"] == 4:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the machine is gone"):
        patch.setattr(build_training, "show", interrupted)
        go(nodes[1])
    assert left(go(nodes[1])) == left(whole)


def left(artifact: Artifact) -> list[Any]:
    """All that a run leaves of what it drew and learned."""
    files = sorted([*artifact.model().glob("*.safetensors"), *artifact.folder.glob("critic/*.safetensors")])
    return [lines_of(artifact.folder), lines_of(artifact.folder, "rollouts.jsonl"), [f.read_bytes() for f in files]]


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
@pytest.mark.parametrize("adapter", [{"kind": "lora"}, "none"], ids=["lora", "full"])
def test_what_is_drawn_beside_steps_does_not_depend_on_who_is_first(
    adapter: Any, precision: str, gpu: str, tiny: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads give work to one device: whether the one that draws goes ahead of the steps or lags behind them, all
    answers, losses and weights are the same to the bit."""
    told, show, found = Ahead._told, build_training.show, []

    def late(self: Ahead, number: int, version: int, prompts: list[int]) -> Any:
        time.sleep(0.3)
        return told(self, number, version, prompts)

    def slow(job: Any, line: Any) -> None:
        time.sleep(0.3)
        show(job, line)

    more: dict[str, Any] = {"rollout": TWICE | {"max_tokens": 12, "asynchronous": 1}, "steps": 8, "adapter": adapter}
    more |= {"loss": {"kind": "grpo", "beta": 0.1}, "precision": precision, "deterministic": True}
    more |= {"reference": "model"} if adapter == "none" else {}
    for name, held, work in (("plain", None, None), ("late", Ahead, late), ("slow", build_training, slow)):
        with monkeypatch.context() as patch:
            if held is not None:
                patch.setattr(held, "_told" if held is Ahead else "show", work)
            found.append(left(go(policy(tiny, asked, tmp_path / name, **more))))
    assert found[0] == found[1] == found[2]
    assert [line["version"] for line in found[0][1][::12]] == [0, 0, 2, 4]
    first = [line for line in found[0][1] if line["rollout"] == 0]
    assert all(line["old"] == line["behaviour"] for line in first)


def test_a_policy_that_does_not_move_draws_ahead_what_it_would_draw_in_turn(
    gpu: str, tiny: Path, asked: Path, tmp_path: Path
) -> None:
    made = []
    for ahead in (0, 1):
        more = {"rollout": ONES | {"asynchronous": ahead}, "optim": {"kind": "sgd", "lr": 1e-30}, "precision": "fp32"}
        made.append(go(policy(tiny, asked, tmp_path / str(ahead), **more, loss={"kind": "dapo", "beta": 0.1})))
    waited, ahead_of = (lines_of(one.folder, "rollouts.jsonl") for one in made)
    assert [one["ids"] for one in ahead_of] == [one["ids"] for one in waited]
    for mine, theirs in zip(*(steps_of(one.folder) for one in reversed(made)), strict=True):
        assert mine.pop("importance") == 1.0
        assert mine == theirs


def test_models_that_judge_and_refer_are_on_the_device(gpu: str, tiny: Path, asked: Path, tmp_path: Path) -> None:
    """A reward model beside the policy, and a reference of its own."""
    scorer = reward(tiny, pairs_of(tmp_path), tmp_path / "scorer", steps=3)
    scores = [{"kind": "model", "path": str(go(scorer).folder)}]
    more = {"reward": scores, "loss": {"kind": "grpo", "beta": 0.1}, "reference": {"kind": "model", "path": str(tiny)}}
    steps = steps_of(go(policy(tiny, asked, tmp_path / "run", **more)).folder)
    assert all(math.isfinite(line["reward.model"]) for line in steps) and steps[-1]["kl"] > 0
    assert len({line["reward"] for line in steps}) > 1


def pairs_of(folder: Path) -> Path:
    """Pairs of which the answer with `dog` is the better one."""
    rows = []
    for at in range(16):
        prompt = [{"role": "user", "content": f"hello {at}"}]
        sides = {"chosen": "the lazy dog", "rejected": "the brown fox"}
        rows.append({"prompt": prompt} | {k: [{"role": "assistant", "content": v}] for k, v in sides.items()})
    return written(folder / "judged.jsonl", rows)
