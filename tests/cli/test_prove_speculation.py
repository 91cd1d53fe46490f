"""`llmkit prove speculation`: what it shows of this build, and that it fails where a defect was planted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmkit.cli.speculation import closed, joint, parts
from llmkit.cli.speculation.drafters import DRAFTERS
from llmkit.cli.speculation.parts import Asked
from llmkit.cli.speculation.verb import speculation
from llmkit.inference import sampler
from llmkit.inference.sampling import Sampling


def statuses(said: str) -> dict[str, dict[str, str]]:
    parts_ = json.loads(said.splitlines()[-1])["parts"]
    return {name: {one["name"]: one["status"] for one in part["checks"]} for name, part in parts_.items()}


def test_it_passes_and_says_what_it_saw(call, monkeypatch):
    monkeypatch.setattr(closed, "LENGTH", 2)  # the whole toy is in test_speculation_certificate.py
    wanted = ["--only", "acceptance,joint,equality", "--draws", "600", "--sequences", "64"]
    code, told, heard = call("prove", "speculation", *wanted, "--json")
    assert code == 0, told + heard
    found = statuses(told)
    assert (
        len(found["joint"]) == 2 * len(DRAFTERS) + 2
        and len(found["equality"]) == len(DRAFTERS) + 2
        and len(found["acceptance"]) == 8
    )
    assert {status for part in found.values() for status in part.values()} == {"passed"}


def test_a_model_of_the_user_is_compared_too(call, tiny):
    code, told, _ = call("prove", "speculation", str(tiny), "--only", "model")
    assert code == 0 and "known: different answers" in told and "passed: " in told
    code, told, heard = call("prove", "speculation", "--only", "model")
    assert code == 2 and not told and "name a model" in heard


def test_numbers_that_several_places_share_show_in_the_joint_law(monkeypatch, capsys):
    """Each token by itself keeps its law there; what is made together does not."""
    right = sampler.uniform
    monkeypatch.setattr(sampler, "uniform", lambda seed, index, place: right(seed, index, 0))
    assert speculation(Asked(draws=2400), "joint", False) == 1
    assert "failed   all, temperature: chance" in capsys.readouterr().out


def test_what_is_no_part_is_refused(call):
    code, _, heard = call("prove", "speculation", "--only", "luck")
    assert code == 2 and "luck is no part of this proof; fix: use --only law,acceptance,joint,equality,model" in heard
    code, _, heard = call("prove", "speculation", "a", "b")
    assert code == 2 and "b is one word too many" in heard
    code, told, heard = call("prove", "speculation", "no/such/model")
    assert code == 4 and "no/such/model" in heard and not told


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_a_law_that_is_off_by_little_is_told_from_the_models(off: float) -> None:
    law = joint.law(parts.small(), Sampling(temperature=3.0))
    texts, shares = list(law), np.array(list(law.values()))
    moved = shares * (1 + off * np.random.default_rng(0).choice([-1, 1], len(texts)))
    drawn = np.random.default_rng(1).multinomial(100_000, moved / moved.sum())
    counted = {text: int(count) for text, count in zip(texts, drawn, strict=True) if count}
    assert (joint.chance(law, counted) < 1e-6) == (off > 0)
    assert joint.chance(law | {texts[0]: 0.0}, counted) == 0
