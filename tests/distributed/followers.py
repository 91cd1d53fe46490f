"""Ranks that are forked from this process, which has imported all that they need, in the place of new interpreters."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
import time
import traceback
from pathlib import Path

from llmkit.build import rank


class Fork:
    """The process of a rank."""

    def __init__(self, which, port, said):
        parent, (ready, told) = os.getpid(), os.pipe()
        self.status, self.lock = None, threading.Lock()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                gc.freeze()  # threads of an earlier group are not here: to collect what it left would wait for them
                os.closerange(3, told)  # a socket of the first rank would stay open in it
                os.closerange(told + 1, 4096)
                rank.bound(parent)
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                os.environ |= which.environment(port)
                os.write(told, b"\n")
                os.close(told)
                code = rank.serve(said)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)
        os.close(told)
        self.stdout = os.fdopen(ready, "rb")

    def wait(self, timeout=None):
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return self.status

    def poll(self):
        with self.lock:
            if self.status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.status = os.waitstatus_to_exitcode(status) if pid else None
            return self.status

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def gone(pid, seconds=10.0):
    """Whether a process that is no child of this one ends in time; nobody may have asked for its status."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False
