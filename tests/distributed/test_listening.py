"""Where the processes of a run listen: at the interface that was given, and nowhere else."""

import json
import os
import socket
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from llmkit import run
from llmkit.parallel.group import Group
from tests.distributed import QUIET, sft, together

LISTEN = "0A"
"""Of /proc/net/tcp (Linux, proc(5)): a socket that waits for connections."""


def address(said):
    """Of /proc/net/tcp: words of 32 bits, each in the machine's own order."""
    words = [bytes.fromhex(said[at : at + 8])[::-1] for at in range(0, len(said), 8)]
    return str(ip_address(b"".join(words)))


def listening(text, inodes=None):
    """The addresses that sockets of a /proc/net/tcp wait at, of those that are asked for."""
    found = [line.split() for line in text.splitlines() if line.split()[0].endswith(":")]
    found = [words for words in found if words[3] == LISTEN and (inodes is None or words[9] in inodes)]
    return {address(words[1].split(":")[0]) for words in found}


def sockets():
    """The sockets that this process and its children hold, by their inodes."""
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    open_ = [str(link.readlink()) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return {link[8:-1] for link in open_ if link.startswith("socket:[")}


def here(but=frozenset()):
    """Where this process and its children listen, by other sockets than those."""
    inodes = sockets() - but
    return set.union(*(listening(Path(f"/proc/net/{name}").read_text(), inodes) for name in ("tcp", "tcp6")))


def test_the_reading_finds_what_listens_everywhere():
    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0)):
        assert {"0.0.0.0", "127.0.0.1"} <= here()
    with socket.create_server(("::1", 0), family=socket.AF_INET6):
        assert "::1" in here()


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow), pytest.param("zero", marks=pytest.mark.slow)]
)
def test_a_run_listens_at_one_interface_alone(strategy, tiny, rows, tmp_path):
    def work(rank):
        real, before = Group.phase, sockets()

        def phase(group, name, step=0):
            real(group, name, step)
            if (name, step) == ("step", 2):
                (tmp_path / str(rank)).write_text(json.dumps(sorted(here(before))))

        Group.phase = phase
        run(sft(tiny, rows, tmp_path / "run", parallel={"strategy": strategy, "interface": "lo"}), console=QUIET)

    together(2, work, tmp_path)
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [["127.0.0.1"]] * 2
