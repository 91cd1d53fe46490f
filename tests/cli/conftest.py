"""The command line in this process."""

import pytest


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """`llmkit WORDS` in this process, from an empty folder: (exit status, standard output, standard error)."""
    from llmkit.cli.main import _guarded

    monkeypatch.chdir(tmp_path)

    def called(*words):
        code = _guarded([str(word) for word in words], False)
        said = capfd.readouterr()
        return code, said.out, said.err

    return called
