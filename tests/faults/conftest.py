"""What tests of faults share."""

import signal
from pathlib import Path

import pytest

from llmkit.checkpoint import state
from tests.faults import go, in_child, killed_after, sft, whole

NAMES = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_API_KEY",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "GITHUB_TOKEN",
    "GOOGLE_API_KEY",
    "SLACK_TOKEN",
    "PGPASSWORD",
    "DATABASE_PASSWORD",
    "NPM_TOKEN",
    "PYPI_TOKEN",
    "TWINE_PASSWORD",
    "KAGGLE_KEY",
    "COMET_API_KEY",
    "NEPTUNE_API_TOKEN",
    "SSH_PASSPHRASE",
    "AUTHORIZATION",
]
URLS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "MLFLOW_TRACKING_URI")
CANARY = "c4n4ry"


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory):
    """(rows, the folder of an uninterrupted run over them): do not write into them."""
    return whole(tiny, tmp_path_factory.mktemp("world"))


@pytest.fixture
def half(tiny, world, tmp_path):
    """The folder of the same run, killed after its checkpoint at step 4."""
    out = tmp_path / "half"
    assert in_child(lambda: killed_after(4, lambda: go(sft(tiny, world[0], out)))) == -signal.SIGKILL
    assert state.steps(out / "checkpoints") == [4, 2]
    return out


@pytest.fixture
def canaries(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    for name in URLS:
        monkeypatch.setenv(name, f"http://user:{CANARY}-{name}@127.0.0.1:9/simple")
    assert len(NAMES) + len(URLS) == 30


def leaks(folder):
    """The files below a folder that hold a canary, and whether a name does."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [str(path) for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name]
    return found + ["process title"] * (CANARY.encode() in Path("/proc/self/cmdline").read_bytes())
