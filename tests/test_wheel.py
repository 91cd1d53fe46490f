"""The wheel, in an environment of its own without extras: every module imports, and a shipped recipe runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def go(*command, **more):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_works_without_extras(tmp_path):
    go(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT)
    wheel = next(tmp_path.glob("*.whl"))
    go(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    go(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    names = "import pkgutil, llmkit; print(*(m.name for m in pkgutil.walk_packages(llmkit.__path__, 'llmkit.')))"
    modules = [name for name in go(python, "-c", names, cwd=tmp_path).split() if not name.endswith("__main__")]
    assert len(modules) > 60
    go(python, "-c", f"import importlib\nfor name in {modules!r}: importlib.import_module(name)", cwd=tmp_path)
    llmkit = tmp_path / "env" / "bin" / "llmkit"
    assert "smoke/sft" in go(llmkit, "recipes", cwd=tmp_path)
    go(llmkit, "recipes", "smoke/sft", cwd=tmp_path)
    go(llmkit, "run", "sft.yaml", cwd=tmp_path, env={**os.environ, "LLMKIT_CACHE": str(tmp_path / "cache")})
    assert (tmp_path / "runs" / "smoke" / "model" / "adapter_model.safetensors").is_file()
