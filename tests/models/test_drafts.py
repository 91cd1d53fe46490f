"""A model is known by its weights: by no name, and by no way of laying them in files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.core.errors import ModelError
from llmkit.models import drafts
from llmkit.models.node import ModelRef
from llmkit.models.resolve import Resolved, resolve
from tests.conftest import make_model, make_tokenizer


def found(folder: Path) -> Resolved:
    return resolve(ModelRef(name=str(folder)))


@pytest.fixture
def made(tiny: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "draft"
    folder.mkdir()
    drafts.write(folder, "ngram", {"a": 1}, drafts.identity(found(tiny), make_tokenizer()))
    return folder


def check(folder: Path, resolved: Resolved, tokenizer: Any = None) -> None:
    said = drafts.read(folder, "ngram", "speculation.corpus")
    drafts.check(folder, said, resolved, tokenizer or make_tokenizer(), "speculation.corpus")


def test_the_same_weights_are_the_same_model_whatever_they_are_called_and_laid_in(
    tiny: Path, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    check(made, found(tmp_path / "copy"))
    model = make_model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    check(made, found(tmp_path / "shards"))
    save_file(load_file(tiny / "model.safetensors"), tmp_path / "copy" / "model.safetensors", {"note": "another"})
    assert found(tmp_path / "copy").sha256 != found(tiny).sha256
    check(made, found(tmp_path / "copy"))


def test_one_weight_that_differs_is_another_model(tiny: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tuned")
    tensors = load_file(tiny / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    names = rf"was made for {tiny} \([0-9a-f]+\), and not for {tmp_path}/tuned \([0-9a-f]+\)"
    with pytest.raises(ModelError, match=rf"speculation.corpus: {made} {names}; fix: run kind: draft for it"):
        check(made, found(tmp_path / "tuned"))


def test_an_adapter_counts_and_how_it_is_applied(tiny: Path, made: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapter(name: str, seed: int, alpha: int = 8) -> Resolved:
        model = make_model()
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False))
        adapted.peft_config["default"].base_model_name_or_path = str(tiny)
        adapted.save_pretrained(tmp_path / name)
        return found(tmp_path / name)

    one = adapter("one", 1)
    with pytest.raises(ModelError, match="and not for"):
        check(made, one)
    drafts.write(made, "ngram", {}, drafts.identity(one, make_tokenizer()))
    check(made, adapter("same", 1))
    shutil.copytree(tiny, tmp_path / "base")
    check(made, replace(one, name="elsewhere", base=found(tmp_path / "base")))
    for other in (adapter("two", 2), adapter("louder", 1, 16), found(tiny)):
        with pytest.raises(ModelError, match="and not for"):
            check(made, other)


def test_other_tokens_are_refused_before_weights_are_read(tiny: Path, made: Path) -> None:
    wide = make_tokenizer()
    wide.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=f"was made for {tiny}, whose tokens are others than those of {tiny}"):
        check(made, found(tiny), wide)


def test_what_is_of_another_kind_or_version_or_no_drafter_is_refused(tiny: Path, made: Path) -> None:
    with pytest.raises(ModelError, match=r"is of drafter.kind 'ngram', not head; fix: name the folder of another"):
        drafts.read(made, "head", "speculation.path")
    said = json.loads((made / drafts.NAME).read_text())
    for broken, why in (({"version": 2}, "is of version 2, and 1 is read here"), ({"target": 3}, "does not say what")):
        (made / drafts.NAME).write_text(json.dumps(said | broken))
        with pytest.raises(ModelError, match=why):
            drafts.read(made, "ngram", "speculation.corpus")
    with pytest.raises(ModelError, match=r"holds nothing that drafts; fix: give a folder that kind: draft made"):
        drafts.folder_of(str(tiny), "speculation.corpus")
    assert drafts.folder_of(str(made), "speculation.corpus") == made
