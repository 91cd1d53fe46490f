"""What the libraries are told: a process that did without the Hub can come back to it."""

import os
import subprocess

import pytest

from llmkit.core.environment import prepare
from llmkit.core.errors import ModelError
from llmkit.models import fetch


@pytest.mark.parametrize("users", [None, "0", "1"])
def test_the_hub_is_given_back_as_the_user_has_it(users, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if users is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", users)
    for _ in range(2):
        prepare()
        prepare()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        prepare(remote=True)
        assert os.environ.get("HF_HUB_OFFLINE") == users


def test_a_library_that_was_imported_offline_is_not_asked(monkeypatch, tmp_path):
    from huggingface_hub import is_offline_mode

    assert is_offline_mode()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        fetch.fetch_hub("someone/something", None)  # the control: the user wants no network
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked = []

    def run(command, **more):
        asked.append(more["input"])
        return subprocess.CompletedProcess(command, len(asked) - 1, f"{tmp_path}\n", "Traceback\nOSError: no route\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    assert fetch.fetch_hub("someone/something", "main") == tmp_path
    assert asked == ['["someone/something", "main", ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]]']
    with pytest.raises(ModelError, match=r"could not be brought from the Hub \(OSError: no route\)"):
        fetch.fetch_hub("someone/something", None)
