"""Compiling: what is missing is told, nothing half made is left, and the plain twins take over."""

import os
import shutil

import pytest
import torch
from llmkit_kernels import build, table
from llmkit_kernels.gated import silu_mul
from llmkit_kernels.norm import rms_norm

from llmkit.core.cache import cache
from llmkit.core.errors import ResourceError


@pytest.fixture
def fresh(tmp_path, monkeypatch, forgotten):
    """An empty cache, and nothing remembered of what was compiled."""
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def compiler(folder, text):
    path = folder / "g++"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_no_compiler_is_told_and_the_plain_twins_work(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert "no C++ compiler" in build.lacks("norm")
    assert all("no C++ compiler" in how for how in table.rows().values())
    x = torch.randn(3, 16, requires_grad=True)
    silu_mul(rms_norm(x, torch.ones(16), 1e-6), x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_compiler_that_fails_is_told_and_leaves_nothing(fresh, monkeypatch):
    monkeypatch.setenv("CXX", compiler(fresh, "echo 'cpu.cpp:1: no such thing' >&2\nexit 1\n"))
    assert "cpu.cpp:1: no such thing" in build.lacks("norm")
    assert list((fresh / "cache" / "kernels").iterdir()) == []


def test_off_is_off(fresh, monkeypatch):
    monkeypatch.setenv("LLMKIT_KERNELS", "off")
    assert build.lacks("attention") == "LLMKIT_KERNELS=off"
    assert not (fresh / "cache").exists()


def test_a_cache_that_others_may_write_to_is_refused(fresh):
    folder = fresh / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "others may write" in build.lacks("norm")
    assert list(folder.iterdir()) == []


def test_a_cache_of_another_user_is_refused_by_models_and_kernels_alike(fresh, monkeypatch):
    assert cache() == fresh / "cache"  # the control
    (fresh / "cache" / "kernels").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "kernels belongs to another user" in build.lacks("norm")
    with pytest.raises(ResourceError, match="LLMKIT_CACHE: .*cache belongs to another user"):
        cache()


def test_a_library_is_made_once_and_named_by_what_it_was_made_from(fresh, monkeypatch):
    if build.lacks("norm"):
        pytest.skip(build.lacks("norm"))
    (made,) = (fresh / "cache" / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    build.library.cache_clear()
    build.library("norm")
    assert made.stat().st_mtime_ns == before and os.fspath(made.name).startswith("norm-")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-fno-strict-aliasing"))
    build.library.cache_clear()
    build.library("norm")
    assert len(list((fresh / "cache" / "kernels").iterdir())) == 2


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_a_c_compiler_that_another_library_named_makes_them_too(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "gcc")
    assert build.lacks("paged") == ""
