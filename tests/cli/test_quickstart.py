"""What the quickstart tells at its end."""

import os
import sys

import pytest

from llmkit.cli import quickstart


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A file `bin/llmkit` that this process was called by; PATH leads elsewhere."""
    made = tmp_path / "bin" / "llmkit"
    made.parent.mkdir()
    made.write_text("#!/bin/sh\n")
    made.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(made), "quickstart"])
    monkeypatch.setenv("PATH", os.devnull)
    return made


def test_the_next_commands_name_a_program_that_the_shell_finds(script, tmp_path, monkeypatch):
    said = quickstart._next(tmp_path)
    assert said[0] == f"{script} chat {tmp_path / 'tune'}" and said[2].count(str(script)) == 2
    monkeypatch.setenv("PATH", str(script.parent))
    assert quickstart._next(tmp_path)[0].startswith("llmkit chat ")


def test_called_as_a_module_the_script_beside_the_interpreter_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llmkit/__main__.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert quickstart._program() == str(script)
    script.unlink()
    assert quickstart._program() == f"{tmp_path / 'bin' / 'python'} -m llmkit"
