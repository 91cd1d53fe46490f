"""Two hosts with addresses of their own, as network namespaces joined by a veth pair: the link is cut, and healed."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from llmkit.core.scalars import Origin
from llmkit.parallel.judge import QUIET
from llmkit.recipe.load import Recipe
from llmkit.recipe.show import resolved
from tests.distributed import equal, lines, trained
from tests.distributed.test_listening import listening

ADDRESSES = ("10.231.77.1", "10.231.77.2")
PORT = "29731"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces. Names hold the process's id, so that two sessions do not meet."""

    def __init__(self):
        self.names = [f"lk{os.getpid()}{side}" for side in "ab"]
        self.links = [f"lk{os.getpid() % 10**8}{side}" for side in "ab"]

    def __enter__(self):
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    @contextmanager
    def cut(self, ways):
        """Nothing arrives: one way what the second host sends is dropped, both ways the link is down."""
        if ways == "both":
            ip("-n", self.names[1], "link", "set", self.links[1], "down")
        else:
            self._astray(True)
        try:
            yield
        finally:
            if ways == "both":
                ip("-n", self.names[1], "link", "set", self.links[1], "up")
            else:
                self._astray(False)

    def _astray(self, sent):
        """What the second host sends to the first is addressed to a machine that is not there, or is no more."""
        words = ["neigh", "replace" if sent else "del", ADDRESSES[0], "dev", self.links[1]]
        ip("-n", self.names[1], *words, *(["lladdr", "02:00:00:00:00:01", "nud", "permanent"] if sent else []))

    def listening(self, side):
        """Where anything on a host listens: there is nothing there but a rank."""
        words = ["ip", "netns", "exec", self.names[side], "cat", "/proc/net/tcp", "/proc/net/tcp6"]
        return listening(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    def start(self, recipe, driver, said):
        """A rank on each host."""
        made = []
        for rank, name in enumerate(self.names):
            known = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            known |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT, "OMP_NUM_THREADS": "1"}
            words = ["ip", "netns", "exec", name, sys.executable, str(driver), "run", str(recipe)]
            file = (said / f"said-{rank}.txt").open("a")
            made.append(subprocess.Popen(words, env={**os.environ, **known}, stderr=file, stdout=file))
        return made


@pytest.fixture
def hosts():
    try:
        with Hosts() as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as cause:
        pytest.skip(f"no network namespaces here: {getattr(cause, 'stderr', '') or cause}")


DRIVER = """
import fcntl, os, time
from llmkit.core import files
from llmkit.parallel.group import Group
real, phase = files.Disk.write, Group.phase
def write(self, path, parts):
    if path.name.startswith(".status"):
        with open({writers!r}, "a") as file:
            file.write(os.environ["RANK"] + "\\n")
    real(self, path, parts)
def slowly(self, name, step=0):
    phase(self, name, step)
    if name == "forward":
        time.sleep(0.05)
    if (name, step) == ("step", 3):
        open({mark!r}, "w").close()
files.Disk.write, Group.phase = write, slowly
from llmkit.cli.main import main
main()
"""


def codes(ranks, seconds):
    until = time.monotonic() + seconds
    found = []
    for rank in ranks:
        try:
            found.append(rank.wait(max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
            found.append(None)
    return found


@pytest.fixture(scope="module")
def run8(make):
    """Eight steps, with a checkpoint after every second."""
    return lambda out: make(out, steps=8, checkpoint={"every": 2}, evaluate={})


@pytest.fixture(scope="module")
def whole(run8, tmp_path_factory):
    """The outcome of the same run on one host: the control."""
    return trained(2, run8, tmp_path_factory.mktemp("whole"), "whole", 280.0)


@pytest.fixture
def world(run8, whole, tmp_path):
    """A recipe's file, the driver's, and the control."""
    text = resolved(Recipe((("", run8(tmp_path / "run")),), {"": Origin()}))
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "driver.py").write_text(DRIVER.format(mark=str(tmp_path / "mark"), writers=str(tmp_path / "writers")))
    return tmp_path / "recipe.yaml", tmp_path / "driver.py", whole


def test_two_hosts_train_as_one_and_listen_at_their_link_alone(hosts, world, tmp_path):
    recipe, driver, whole = world
    ranks = hosts.start(recipe, driver, tmp_path)
    while not (tmp_path / "mark").exists():
        assert all(rank.poll() is None for rank in ranks), (tmp_path / "said-0.txt").read_text()
        time.sleep(0.02)
    found = [hosts.listening(side) for side in (0, 1)]
    assert codes(ranks, 600) == [0, 0], (tmp_path / "said-0.txt").read_text()
    equal(tmp_path / "run", whole, 0.0)
    assert found == [{address} for address in ADDRESSES]


@pytest.mark.parametrize("ways", ["one", "both"])
@pytest.mark.parametrize("seconds", [1, 10, 60])
def test_a_cut_link_leaves_one_writer_and_the_healed_run_is_the_same(seconds, ways, hosts, world, tmp_path):
    recipe, driver, whole = world
    ranks = hosts.start(recipe, driver, tmp_path)
    while not (tmp_path / "mark").exists():
        assert all(rank.poll() is None for rank in ranks), (tmp_path / "said-0.txt").read_text()
        time.sleep(0.02)
    with hosts.cut(ways):
        time.sleep(seconds)
    found = codes(ranks, 2 * QUIET + 300)
    assert found in ([0, 0], [6, 6]), f"{found}: {(tmp_path / 'said-0.txt').read_text()}"
    assert seconds < 60 or found == [6, 6]
    assert set((tmp_path / "writers").read_text().split()) == {"0"}  # rank 0 lives, and holds the folder
    if found == [6, 6]:
        said = json.loads((tmp_path / "run" / "status.json").read_text())
        assert said["state"] == "failed" and "rank 1 (" in said["why"]
        assert codes(hosts.start(recipe, driver, tmp_path), 600) == [0, 0]
    equal(tmp_path / "run", whole, 0.0)
    assert lines(tmp_path / "run") == lines(whole)
