"""What was found by trying is kept by all that it follows from, and by nothing less."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.models import tried as module
from llmkit.models.load import How, Loaded, load
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from tests.conftest import make_model, make_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, but for what is compiled."""
    (tmp_path / "cache").mkdir(mode=0o700)
    for name in module.COMPILED:  # found before the cache is another one
        module._compiled(name)
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMKIT_CACHE_SIZE", raising=False)
    return tmp_path / "cache" / "probes"


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The models that were tried."""
    made: list[Any] = []
    real = module.probe

    def probe(model: Any) -> Any:
        made.append(model)
        return real(model)

    monkeypatch.setattr(module, "probe", probe)
    yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path, how: How = How(), **more: Any) -> Loaded:
    ref = ModelRef(name=str(folder), **more)
    return load(resolve(ref), ref, how)


def test_a_second_start_tries_nothing_and_says_the_same(folder: Path, tries: list[Any]) -> None:
    first = opened(folder).support
    assert first.packed and first.tree and first.paged and len(tries) == 1
    assert opened(folder).support == first and len(tries) == 1


def test_a_changed_byte_of_the_weights_is_tried_again_though_size_and_time_are_as_before(
    folder: Path, tries: list[Any]
) -> None:
    opened(folder)
    file = folder / "model.safetensors"
    before = file.stat()
    held = load_file(file)
    held["model.norm.weight"][3] += 1
    save_file(held, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    opened(folder)
    assert len(tries) == 2


@pytest.mark.parametrize("what", ["config", "attention", "dtype", "tokens"])
def test_whatever_else_it_follows_from_is_tried_again(what: str, folder: Path, tries: list[Any]) -> None:
    opened(folder)
    if what == "config":
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 1e-5}))
    how = How(dtype="bf16" if what == "dtype" else "fp32")
    more = {"attention": {"attention": "eager"}, "tokens": {"add_tokens": ("<new>",)}}.get(what, {})
    opened(folder, how, **more)
    assert len(tries) == 2


def test_other_code_is_tried_again(folder: Path, tries: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    opened(folder)
    code = dict(module._code())
    for name in code:
        monkeypatch.setattr(module, "_code", lambda name=name: code | {name: "another"})
        opened(folder)
    assert len(tries) == 1 + len(code) and set(code) >= {"torch", "transformers", "llmkit", "paged"}


def test_s7_an_entry_that_was_changed_is_not_believed(folder: Path, tries: list[Any], cache: Path) -> None:
    first = opened(folder).support
    (entry,) = cache.glob("*/manifest.json")
    said = json.loads(entry.read_text())
    said["facts"]["paged"] = False
    entry.write_text(json.dumps(said))
    assert opened(folder).support == first and len(tries) == 2
    assert opened(folder).support == first and len(tries) == 2  # it was made again


def test_s7_a_cache_that_others_may_write_to_is_not_read(folder: Path, tries: list[Any], cache: Path) -> None:
    first = opened(folder).support
    cache.chmod(0o777)
    assert opened(folder).support == first and len(tries) == 2


def test_code_that_a_model_brings_is_tried_each_time(folder: Path, tries: list[Any]) -> None:
    loaded = opened(folder)
    kind = type(loaded.model)
    loaded.model.__class__ = type(kind.__name__, (kind,), {"__module__": "transformers_modules.own"})
    with torch.no_grad():
        for _ in range(2):
            module.tried(loaded.model, loaded.resolved)
    assert len(tries) == 3
