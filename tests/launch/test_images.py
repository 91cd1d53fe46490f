"""The Dockerfiles and the versions: what they name is there, and the two lists of versions agree."""

import re

import pytest

from llmkit.recipe.shipped import folder

ROOT = folder("launch").parent


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub("[-_.]+", "-", key.lower()): value for key, value in found}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_what_an_image_copies_is_in_the_checkout(name):
    text = (folder("launch") / name).read_text()
    copied = [word for line in re.findall("^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert {"llmkit", "kernels", "recipes", "launch", "pyproject.toml"} <= set(copied)
    assert all((ROOT / word).exists() for word in copied)
    assert re.findall("^FROM ", text, re.M) == ["FROM "]


def test_versions_for_gpus_are_those_that_are_tested_here():
    here, gpus = pins("constraints.txt"), pins("constraints-cuda.txt")
    common = here.keys() & gpus.keys()
    assert {"torch", "transformers", "peft", "bitsandbytes", "accelerate"} <= common
    assert {key: gpus[key] for key in common} == {key: here[key] for key in common}
    assert "deepspeed" in gpus and any(key.startswith("nvidia-nccl") for key in gpus)
