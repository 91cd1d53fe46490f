"""What goes to the Hub, and that nothing goes there unasked: a stand-in takes the place of the Hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from llmkit import Sft, run
from llmkit.cli.runs import push
from llmkit.core.console import Console
from llmkit.core.errors import RecipeError, ResourceError
from llmkit.stages.places import named, without_places


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


def everything(sent):
    """What was sent, as one: the bytes of every file."""
    (files,) = (files for what, _, files in sent if what == "commit")
    return {name: part if isinstance(part, bytes) else Path(part).read_bytes() for name, part in files.items()}


LORA, WHOLE = {"kind": "lora", "rank": 2}, {"kind": "none"}
PROMPT = {"kind": "prompt_tuning", "virtual_tokens": 2}


@pytest.mark.parametrize(
    "adapter,way",
    [(LORA, "absolute"), (LORA, "relative"), (LORA, "home"), (PROMPT, "absolute"), (WHOLE, "relative")],
    ids=lambda value: value if isinstance(value, str) else value["kind"],
)
def test_nothing_that_is_sent_names_a_place_of_this_machine(adapter, way, tiny, rows, hub, tmp_path, monkeypatch):
    home, here = tmp_path / "home-of-me", tmp_path / "work-of-me"
    shutil.copytree(tiny, home / "secret-models" / "tiny")
    (here / "secret-data").mkdir(parents=True)
    shutil.copy(rows, here / "secret-data" / "rows.jsonl")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    models = {"absolute": str(home / "secret-models" / "tiny"), "home": "~/secret-models/tiny"}
    model = models.get(way, "../home-of-me/secret-models/tiny")
    path = str(here / "secret-data" / "rows.jsonl") if way == "absolute" else "secret-data/rows.jsonl"
    data = {"train": [{"kind": "jsonl", "path": path}], "max_length": 96, "packing": "none"}
    more = {"adapter": adapter, "batch": {"rows": 5}, "steps": 1, "push": {"repo": "me/mine"}}
    artifact = go(Sft(model=model, data=data, out=str(tmp_path / "out-of-me" / "run"), **more))
    files = everything(hub.sent)
    assert files.keys() == {"README.md", *(str(p.relative_to(artifact.model())) for p in artifact.model().iterdir())}
    for name, held in files.items():
        short = () if name.endswith(".safetensors") else ("~/", "../")  # numbers may look like those
        for place in (str(tmp_path), "of-me", "secret", *short):
            assert place.encode() not in held, (name, place)
    card = files["README.md"].decode()
    assert "tiny, trained by llmkit" in card and "- base model: tiny\n" in card and "path: rows.jsonl" in card
    if adapter is not WHOLE:
        facts, settings = (json.loads(files[name]) for name in ("llmkit.json", "adapter_config.json"))
        assert settings["base_model_name_or_path"] == facts["base"]["name"] == "tiny"
        kept = json.loads((artifact.model() / "llmkit.json").read_text())
        assert facts["base"] == kept["base"] | {"name": "tiny"} and Path(kept["base"]["name"]).name == "tiny"
        kept = json.loads((artifact.model() / "adapter_config.json").read_text())
        assert settings == kept | {key: "tiny" for key in kept if key.endswith("name_or_path") and kept[key]}


PLACES = {
    "/home/me/x": "x",
    "/home/me/x/": "x",
    "~/x": "x",
    "~": "~",
    "./me/x": "x",
    "../home/me/x": "x",
    "me/../../x": "x",
    "file:///home/me/x": "x",
    "file:x": "x",
    "C:\\me\\x": "x",
    "http://user:pass@host/x": "http://***@host/x",
    "https://host/x?token=secret": "https://host/x",
    "me/model": "me/model",
    "see https://host/x?token=secret, or ask: yes/no?": "see https://host/x or ask: yes/no?",
    "all-linear": "all-linear",
    ".*[.](q|v)_proj": ".*[.](q|v)_proj",
    "</s>": "</s>",
}


@pytest.mark.parametrize("text", PLACES)
def test_places_are_told_from_other_text(text):
    assert without_places({"a": [text]}) == {"a": [PLACES[text]]}


def test_relative_files_are_told_by_their_key():
    said = {"path": ("me/x", "s3://store/x"), "name": "me/model", "out": "me/run/", "template": "chatml"}
    assert without_places(said) == said | {"path": ["x", "s3://store/x"], "out": "run"}


def test_an_adapter_on_an_adapters_base_names_no_folder_either():
    facts = {"name": "../me/run", "source": "folder", "base": {"name": "me/tiny", "source": "folder", "sha256": "1"}}
    assert named(facts) == {"name": "run", "source": "folder", "base": {**facts["base"], "name": "tiny"}}
    hub = {"name": "me/model", "source": "hub:me/model"}
    assert named(hub) == hub


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
