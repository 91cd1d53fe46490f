"""S2 where the system itself has no network: in a namespace of its own there is loopback and no way out of it."""

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from llmkit.cli.main import _guarded
from llmkit.models.node import ModelRef
from llmkit.serve import start as starting
from tests.faults import go, in_child, sft
from tests.faults.test_serve_secrets import heard
from tests.serve.real import at_work, engine_of, running

ROOT = Path(__file__).parents[2]
NEWNET, NEWUSER = 0x40000000, 0x10000000
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1
NONE = 77
"""How a child ends that may make no namespace."""


def leave():
    """From here on this process, and what it starts, has a loopback of its own and nothing else."""
    made = ctypes.CDLL(None, use_errno=True)
    if made.unshare(NEWNET) and made.unshare(NEWUSER | NEWNET):
        os._exit(NONE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        asked = struct.pack("16sh", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(own, GET_FLAGS, asked), 16)
        fcntl.ioctl(own, SET_FLAGS, struct.pack("16sh", b"lo", flags | UP))
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


def away(work):
    """The status of `work`, done where there is no route."""

    def apart():
        leave()
        work()

    status = in_child(apart)
    if status == NONE:
        pytest.skip("no network namespace may be made here")
    return status


def no_route():
    """The control: outside is not reached, and it is the system that says so."""
    with pytest.raises(OSError) as refused:
        socket.create_connection(("192.0.2.1", 9), timeout=5)
    assert refused.value.errno == errno.ENETUNREACH


ASKED = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def answers(url):
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        assert client.post("/v1/chat/completions", json=ASKED).status_code == 200
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        assert all(client.get(path).status_code == 200 for path in ("/", "/metrics", "/v1/models"))


def test_s2_training_generating_and_serving_need_no_route_and_try_none(tiny, world, tmp_path):
    seen = tmp_path / "seen"

    def serve():
        starting.start(starting.Settings(ModelRef(name=str(tiny)), port=0), engine_of)

    def work():
        no_route()
        heard(seen)  # of all that is started from here
        os.environ.pop("HF_HUB_OFFLINE", None)
        go(sft(tiny, world[0], tmp_path / "run", steps=2, checkpoint={"every": 2}))
        assert _guarded(["generate", str(tmp_path / "run"), "hi", "--max-tokens", "2"], False) == 0
        with at_work(tmp_path / "log", serve, 60) as server:
            answers(server.url)
            assert server.stop(30) == 0

    assert away(work) == 0 and not seen.exists()

    def control():
        heard(seen)
        socket.create_connection(("192.0.2.1", 9), timeout=5)

    assert away(control) == 1 and seen.read_text()


@pytest.mark.slow
def test_s2_interpreters_of_their_own_import_train_and_serve_without_a_route(tiny, world, tmp_path, monkeypatch):
    """The commands as they are typed, from their imports on."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))))
    monkeypatch.chdir(tmp_path)
    apart = [shutil.which("unshare") or "unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not shutil.which("ip") or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace may be made here")
    run = [*apart, sys.executable, "-m", "llmkit"]
    for words in (["run", str(world[1] / "resolved.yaml"), "out=o"], ["generate", "o", "hi", "--max-tokens", "2"]):
        done = subprocess.run([*run, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    text = "import httpx, sys; from tests.faults.test_no_route import answers; answers(sys.argv[1])"
    with running(
        lambda err: subprocess.Popen([*run, "serve", "o", "--port", "0"], stderr=err), tmp_path / "log", 120
    ) as on:
        enter = ["nsenter", "-t", str(on.process.pid), "-U", "-n", "--preserve-credentials"]
        subprocess.run([*enter, sys.executable, "-c", text, on.url], check=True)
        assert on.stop() == 0
