"""The engine's process is begun before the server reads anything, and never outlives a start that fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.cli.main import _guarded
from llmkit.core.errors import LlmkitError
from llmkit.models.node import ModelRef
from llmkit.serve import start as module
from llmkit.serve.messages import Link, packed
from llmkit.serve.remote import Remote
from llmkit.serve.start import Settings, start


class Fake:
    """A process that says at once that it is ready, and hears what it is told."""

    def __init__(self, theirs: socket.socket) -> None:
        self.own, self.pid, self.killed = theirs.dup(), 0, False
        self.own.sendall(packed({"ready": {"words": 4}}))

    def poll(self) -> int | None:
        """It runs until it is killed."""
        return -9 if self.killed else None

    def kill(self) -> None:
        """Ends it."""
        self.killed = True
        self.own.close()


def test_what_was_begun_is_gone_on_with_and_started_again_when_it_dies() -> None:
    made: list[Fake] = []

    def how(theirs: socket.socket) -> Fake:
        made.append(Fake(theirs))
        return made[-1]

    async def lives() -> None:
        remote = Remote({"loaded": {}}, how)
        remote.begin()
        assert len(made) == 1 and Link(made[0].own).first(1.0) == {"loaded": {}}
        keeping = asyncio.create_task(remote.keep())
        for count in (1, 2):
            while not (remote.ready and len(made) == count):
                await asyncio.sleep(0.001)
            made[-1].kill()
            while remote.ready:
                await asyncio.sleep(0.001)
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        remote.take_back()  # nothing is left to take back

    asyncio.run(asyncio.wait_for(lives(), 20))


def test_where_there_is_no_room_for_a_process_it_is_tried_again() -> None:
    made: list[Fake] = []
    tries: list[int] = []

    def how(theirs: socket.socket) -> Fake:
        tries.append(theirs.fileno())
        if len(tries) == 2:
            raise OSError(errno.ENOMEM, "no memory")
        made.append(Fake(theirs))
        return made[-1]

    async def lives() -> None:
        remote = Remote({"loaded": {}}, how)
        remote.begin()
        keeping = asyncio.create_task(remote.keep())
        while not remote.ready:
            await asyncio.sleep(0.001)
        made[0].kill()
        while not (remote.ready and len(made) == 2):
            assert not keeping.done()
            await asyncio.sleep(0.001)
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping

    asyncio.run(asyncio.wait_for(lives(), 20))
    assert len(tries) == 3


@pytest.mark.parametrize("fault", ["no tokenizer", "no model", "no record"])
def test_a_start_that_fails_leaves_no_process(
    fault: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.logs, "begin", lambda: None)  # the loggers stay those of the tests
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny.iterdir():
        if not file.name.startswith("token" if fault == "no tokenizer" else " "):
            (folder / file.name).symlink_to(file)
    if fault == "no model":
        (folder / "config.json").unlink()
    record = Path("/dev/null/requests.jsonl") if fault == "no record" else None
    made: list[Fake] = []

    def how(theirs: socket.socket) -> Fake:
        made.append(Fake(theirs))
        return made[-1]

    with caplog.at_level("INFO", "llmkit.serve"), pytest.raises(LlmkitError):
        start(Settings(ModelRef(name=str(folder)), port=0, journal=record), how)
    assert [(one.getMessage(), vars(one)["model"]) for one in caplog.records] == [("loading", str(folder))]
    assert [one.killed for one in made] == [True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("model: TINY\nkey_file: nowhere", "nowhere: cannot be read"),
        ("model: TINY\nadapters: {a: nowhere}", "adapters.a: nowhere is no folder"),
        ("model: nomodel", "model: nomodel is no alias"),
        ("model: empty", "has no config.json"),
    ],
)
def test_a_server_that_is_refused_leaves_no_folder_of_a_run(
    line: str, said: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.logs, "begin", lambda: None)
    monkeypatch.setattr(module.start, "__defaults__", (Fake,))
    (tmp_path / "empty").mkdir()
    (tmp_path / "r.yaml").write_text(f"kind: serve\nport: 0\nout: o/p\n{line.replace('TINY', str(tiny))}\n")
    assert _guarded(["run", "r.yaml"], False) in (2, 4)
    told = capfd.readouterr().err
    assert said in told and told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "r.yaml"]


def test_what_starts_the_engine_has_imported_nothing_heavy() -> None:
    code = f"import sys, {module.__name__}; print(*{{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()
