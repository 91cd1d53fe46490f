"""S4: what is installed from `locks/` is what was looked at when they were made; of anything else nothing is."""

import base64
import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("build", "dev", "run", "torch")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
MACHINES = [
    default_environment() | {"python_full_version": full, "python_version": short, "platform_machine": machine}
    for full, short in (("3.11.9", "3.11"), ("3.12.4", "3.12"), ("3.13.1", "3.13"))
    for machine in ("x86_64", "aarch64")
]


def entries(name):
    """(requirement, its hashes) of each entry of a lock."""
    text = (ROOT / "locks" / f"{name}.txt").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        said, *hashes = line.split("--hash=")
        yield Requirement(said), ["--hash=" + one.strip() for one in hashes]


def pins(*names, machine=MACHINES[0]):
    """Name -> version, on one machine."""
    made = {}
    for name in names:
        for one, _ in entries(name):
            if one.marker is None or one.marker.evaluate(machine):
                made[canonicalize_name(one.name)] = next(iter(one.specifier)).version
    return made


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def wanted(extra):
    """What the project asks for, with an extra and those that it names."""
    extras = project()["optional-dependencies"]
    asked, left, seen = [Requirement(one) for one in project()["dependencies"]], [extra], set()
    while left:
        seen.add(name := left.pop())
        for one in map(Requirement, extras[name]):
            left += one.extras - seen if one.name == "llmkit" else ()
            asked += [one] if one.name != "llmkit" else []
    return asked


@pytest.mark.parametrize("name", LOCKS)
def test_each_entry_is_one_version_and_has_hashes_and_nothing_says_where_from(name):
    held = list(entries(name))
    assert held
    for one, hashes in held:
        assert [spec.operator for spec in one.specifier] == ["=="] and one.url is None, one
        assert hashes and all(map(HASH.fullmatch, hashes)), one
    text = (ROOT / "locks" / f"{name}.txt").read_text()
    assert "://" not in text and "-index" not in text and "--find-links" not in text and "--trusted" not in text


@pytest.mark.parametrize("extra, name", [("all", "run"), ("dev", "dev")])
def test_a_lock_holds_what_the_project_asks_for(extra, name):
    for machine in MACHINES:
        held = pins(name, "torch", machine=machine)
        for one in wanted(extra):
            assert held[canonicalize_name(one.name)] in one.specifier, one


def test_what_constraints_pin_the_locks_pin_too_and_all_agree():
    said = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    for machine in MACHINES:
        held = pins(*LOCKS, machine=machine)
        assert {canonicalize_name(one.name): next(iter(one.specifier)).version for one in said}.items() <= held.items()
        for name in LOCKS:
            assert pins(name, machine=machine).items() <= held.items()
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for one in map(Requirement, asked):
        assert pins("build")[canonicalize_name(one.name)] in one.specifier


def test_torch_and_what_its_build_brings_are_in_a_file_of_their_own():
    alone = set(pins("torch"))
    assert "torch" in alone and all(name == "torch" or re.match("triton|cuda-|nvidia-", name) for name in alone)
    assert not alone & (set(pins("run")) | set(pins("dev")))


def wheel(folder, word):
    """A package of one module, as small as they come."""
    folder.mkdir()
    path = folder / "looked_at-1.0-py3-none-any.whl"
    info = "looked_at-1.0.dist-info"
    files = {
        "looked_at.py": f"WORD = {word!r}\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: looked-at\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(text)}")
    with zipfile.ZipFile(path, "w") as made:
        for name, text in {**files, f"{info}/RECORD": "\n".join([*lines, f"{info}/RECORD,,", ""])}.items():
            made.writestr(name, text)
    return path


def install(lock, place, target):
    """As docs and `make locked` have it, from a folder in the place of an index."""
    flags = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("HASHED"))
    words = [sys.executable, "-m", "pip", "--isolated", "install", *flags.partition(":=")[2].split()]
    words += ["--no-index", "--find-links", str(place), "--target", str(target), "-r", str(lock)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env={"PIP_CONFIG_FILE": "/dev/null"})


def test_a_release_with_another_hash_is_refused_and_nothing_is_installed(tmp_path):
    good, bad = wheel(tmp_path / "good", "as it was"), wheel(tmp_path / "bad", "something else")
    lock, target = tmp_path / "lock.txt", tmp_path / "target"
    lock.write_text(f"looked-at==1.0 \\\n    --hash=sha256:{hashlib.sha256(good.read_bytes()).hexdigest()}\n")
    refused = install(lock, bad.parent, target)
    assert refused.returncode != 0 and "DO NOT MATCH THE HASHES" in refused.stderr
    assert not target.exists() or not list(target.iterdir())
    done = install(lock, good.parent, target)  # the control
    assert done.returncode == 0, done.stderr
    assert (target / "looked_at.py").read_text() == "WORD = 'as it was'\n"


def test_an_entry_without_a_hash_is_refused(tmp_path):
    good = wheel(tmp_path / "good", "as it was")
    (tmp_path / "lock.txt").write_text("looked-at==1.0\n")
    refused = install(tmp_path / "lock.txt", good.parent, tmp_path / "target")
    assert refused.returncode != 0 and "hash" in refused.stderr.lower()
    assert not (tmp_path / "target" / "looked_at.py").exists()
