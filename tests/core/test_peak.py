"""The peak of a process is its own."""

import subprocess
import sys

from llmkit.core.memory import HIGH, peak

CHILD = "from llmkit.core.memory import peak; print(peak('cpu'))"


def test_the_peak_of_who_started_it_is_not_the_childs():
    held = bytearray(400 << 20)
    held[::4096] = b"1" * len(held[::4096])
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert peak("cpu") > len(held)
    assert not HIGH.exists() or int(done.stdout) < len(held)
