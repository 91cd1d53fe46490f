"""The wheel, in an environment of its own without extras: every module imports, and a shipped recipe runs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def go(*command, **more):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


EACH = """
import importlib, pkgutil, sys
for top in map(importlib.import_module, ("llmkit", "llmkit_kernels")):
    assert top.__path__[0].startswith(sys.prefix), top.__path__
    for module in pkgutil.walk_packages(top.__path__, top.__name__ + "."):
        if not module.name.endswith("__main__"):
            print(importlib.import_module(module.name).__name__)
"""
"""Imports every module, from the environment and not from a checkout, and prints its name."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    go(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_holds_every_source_and_recipe_and_nothing_else(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    tops = ("llmkit", "kernels", "recipes", "launch")
    files = [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]
    ours = [str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"]
    wanted = {re.sub("^(recipes|launch)/", r"llmkit/_shipped/\1/", name.removeprefix("kernels/")) for name in ours}
    assert {name for name in held if ".dist-info/" not in name} == wanted
    assert {Path(name).suffix for name in wanted} >= {".py", ".cpp", ".h", ".yaml", ".json"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_wheel_works_without_extras(wheel, tmp_path):
    go(sys.executable, "-m", "venv", tmp_path / "env")
    python, llmkit = (tmp_path / "env" / "bin" / name for name in ("python", "llmkit"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["LLMKIT_CACHE"] = str(tmp_path / "cache")
    clean = partial(go, cwd=tmp_path, env=env)
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    clean(python, "-m", "pip", "install", "--quiet", torch)  # alone and first: else pip may take another build of it
    clean(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    extras = (
        "import importlib.util as u; print([n for n in ('bitsandbytes', 'pyarrow', 'tensorboard') if u.find_spec(n)])"
    )
    assert clean(python, "-c", extras) == "[]\n"
    sources = [*(ROOT / "llmkit").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    imported = set(clean(python, "-c", EACH).split())
    assert len(imported) == len(sources) - 3  # the two tops are imported already, and `__main__` would run
    if shutil.which("g++"):
        live = clean(python, "-c", "from llmkit_kernels.table import rows; print(*set(rows().values()))")
        assert live == "compiled for this CPU\n"
    assert "smoke/sft" in clean(llmkit, "recipes")
    clean(llmkit, "recipes", "smoke/sft")
    clean(llmkit, "run", "sft.yaml")
    assert (tmp_path / "runs" / "smoke" / "model" / "adapter_model.safetensors").is_file()
