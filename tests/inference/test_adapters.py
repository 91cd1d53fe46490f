"""Adapters by name: who holds which version, what goes when there are too many, and which folders may be read."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmkit.core.errors import ModelError
from llmkit.inference.adapters import Adapters
from llmkit.inference.request import RequestError


@dataclass(frozen=True)
class One:
    mark: str
    virtual: int = 0


class Folders:
    """A bank whose adapters are the texts of their files."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.left: list[str] = []

    def read(self, folder: Path) -> One:
        try:
            return One((folder / "text").read_text())
        except OSError as cause:
            raise ModelError("is no adapter", file=str(folder)) from cause

    def made(self, like: str, tensors: Mapping[str, Any]) -> One:
        return One(f"{self.held[like]}+{tensors['text']}")

    def put(self, key: str, adapter: One) -> None:
        self.held[key] = adapter.mark

    def leave(self, adapter: One) -> None:
        self.left.append(adapter.mark)

    def drop(self, key: str) -> None:
        del self.held[key]


@pytest.fixture
def folders(tmp_path):
    for name in "abc":
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "text").write_text(name)
    return tmp_path / "root"


def test_a_request_keeps_the_version_that_it_began_with(folders):
    adapters = Adapters(bank := Folders(), folders)
    adapters.load("x", "a")
    first = adapters.hold("x")
    adapters.load("x", "b")
    second = adapters.hold("x")
    adapters.replace("x", {"text": "more"})
    third = adapters.hold("x")
    assert [bank.held[one.key] for one in (first, second, third)] == ["a", "b", "b+more"]
    adapters.unload("x")
    with pytest.raises(RequestError, match="no adapter is named 'x'"):
        adapters.hold("x")
    with pytest.raises(RequestError, match="itself is no adapter"):
        adapters.replace("", {"text": "more"})
    for one in (first, second, third):
        assert one.key in bank.held
        adapters.release(one)
    assert bank.held == {} and adapters.names == []


def test_a_load_that_fails_leaves_the_old_one(folders):
    adapters = Adapters(bank := Folders(), folders)
    adapters.load("x", "a")
    (folders / "b" / "text").unlink()
    with pytest.raises(ModelError):
        adapters.load("x", "b")
    with pytest.raises(ModelError):
        adapters.load("y", "b")
    assert adapters.names == ["x"] and bank.held[adapters.hold("x").key] == "a"


def test_the_longest_unused_makes_room_and_comes_back_as_it_was(folders):
    adapters = Adapters(bank := Folders(), folders, most=2)
    for name in "abc":
        adapters.load(name, name)
    assert sorted(bank.held.values()) == ["b", "c"] and adapters.names == ["a", "b", "c"]
    held = adapters.hold("a")
    assert sorted(bank.held.values()) == ["a", "c"]
    adapters.hold("c")
    with pytest.raises(RequestError, match="all 2 adapters that may lie ready are in use"):
        adapters.hold("b")
    with pytest.raises(RequestError, match="all 2 adapters"):
        adapters.load("d", "b")
    assert bank.left == ["b"]
    adapters.release(held)
    (folders / "b" / "text").write_text("another")
    with pytest.raises(RequestError, match="is not what it was when it was loaded"):
        adapters.hold("b")
    assert bank.left == ["b", "another"]
    (folders / "b" / "text").write_text("b")
    assert bank.held[adapters.hold("b").key] == "b"


def test_one_that_made_room_is_read_again_beside_the_steps_which_wait_for_no_file(folders):
    class Slow(Folders):
        """Others use the adapters while one is read."""

        def read(self, folder):
            with ThreadPoolExecutor(1) as other:
                return other.submit(self.meanwhile).result(20) or super().read(folder)

        def meanwhile(self):
            return None

    adapters = Adapters(bank := Slow(), folders, most=2)
    for name in "abc":
        adapters.load(name, name)
    assert adapters.away("a") and not adapters.away("b") and not adapters.away("") and not adapters.away("x")
    bank.meanwhile = lambda: adapters.release(adapters.hold("c"))
    adapters.prepare("a")
    assert not adapters.away("a") and adapters.away("b") and sorted(bank.held.values()) == ["a", "c"]
    adapters.prepare("a")  # it is here
    bank.meanwhile = lambda: adapters.unload("b")
    adapters.prepare("b")
    assert adapters.names == ["a", "c"] and bank.left == ["b"] and len(bank.held) == 1
    with pytest.raises(RequestError, match="no adapter is named 'b'"):
        adapters.prepare("b")


def test_only_folders_under_the_root_are_read(folders, tmp_path):
    adapters = Adapters(Folders(), folders)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text").write_text("out")
    (folders / "link").symlink_to(tmp_path / "out")
    (folders / "ring").symlink_to(folders / "ring")
    (folders / "here").symlink_to(folders / "a")
    outside = [
        "../out",
        "a/../../out",
        str(tmp_path / "out"),
        str(folders / "a"),
        "link",
        "link/../../out",
        "",
        ".",
        "..",
    ]
    outside += [
        "file:///etc",
        "https://example.org/a",
        "hf://a/b",
        "a\0b",
        "a\nb",
        "~",
        "missing",
        "a/text",
        "ring",
        "x" * 5000,
    ]
    for path in outside:
        with pytest.raises(RequestError) as refused:
            adapters.load("x", path)
        assert refused.value.problems[0].key == "lora_path", path
        assert str(tmp_path) not in str(refused.value).replace(path, ""), path  # no internals
    with pytest.raises(RequestError, match="not loaded by path"):
        Adapters(Folders()).load("x", "a")
    for path in ("a", "./a", "b/../a", "here"):  # the control
        adapters.load("x", path)
    for name in ("", "a" * 129, "a\nb"):
        with pytest.raises(RequestError) as refused:
            adapters.load(name, "a")
        assert refused.value.problems[0].key == "lora_name"
