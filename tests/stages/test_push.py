"""What goes to the Hub, and that nothing goes there unasked: a stand-in takes the place of the Hub."""

import json

import huggingface_hub
import pytest
import yaml

from llmkit import Sft, run
from llmkit.cli.runs import push
from llmkit.core.console import Console
from llmkit.core.errors import RecipeError, ResourceError


class Hub:
    """Keeps what it is sent; `fault` is what it does instead."""

    sent, fault = [], None

    def create_repo(self, repo, private, exist_ok):
        if Hub.fault:
            raise Hub.fault
        Hub.sent.append(("repo", repo, private))

    def create_commit(self, repo, parts, commit_message, revision):
        files = {part.path_in_repo: part.path_or_fileobj for part in parts}
        Hub.sent.append(("commit", repo, files))
        return type("Made", (), {"commit_url": f"https://hub/{repo}/commit/1"})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.sent, Hub.fault = [], None
    return Hub


@pytest.fixture
def node(tiny, rows, tmp_path):
    def made(**more):
        data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 96}
        return Sft(model=str(tiny), data=data, batch={"rows": 5}, steps=1, out=str(tmp_path / "run"), **more)

    return made


def go(node):
    return run(node, console=Console(quiet=True))


def test_nothing_is_sent_unasked(node, hub):
    go(node())
    assert hub.sent == []


def test_the_result_goes_in_one_commit_with_a_card_from_the_manifest(node, hub, tmp_path):
    go(node(push={"repo": "me/mine"}))
    (_, _, private), (_, _, files) = hub.sent
    assert private and set(files) > {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    text = files["README.md"].decode()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "peft" and "llmkit" in header["tags"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert f"- steps: {manifest['step']}" in text and "kind: lora" in text and "tokens per second" in text
    assert str(tmp_path) not in text and "push" not in text


def test_a_hub_that_refuses_leaves_the_result_whole_and_is_asked_again(node, hub, tmp_path):
    hub.fault = OSError("no route to host")
    with pytest.raises(ResourceError, match=r"push: the Hub refuses me/mine \(no route to host\); the result is whole"):
        go(node(push={"repo": "me/mine"}))
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    hub.fault = None
    go(node(push={"repo": "me/mine"}))
    assert [what for what, *_ in hub.sent] == ["repo", "commit"]


def test_push_sends_a_finished_run_and_shows_before_what_it_would_send(node, hub, tmp_path, capsys):
    go(node())
    push(str(tmp_path / "run"), "me/mine", False, True)
    assert "adapter_model.safetensors" in capsys.readouterr().out and hub.sent == []
    push(str(tmp_path / "run"), "me/mine", True, False)
    assert hub.sent[0] == ("repo", "me/mine", False) and "commit/1" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="repo: 'mine' is no OWNER/NAME"):
        push(str(tmp_path / "run"), "mine", True, False)
    with pytest.raises(RecipeError, match="is no run's folder"):
        push(str(tmp_path), "me/mine", True, False)
