"""Disks on which something happens at a call."""

import os
import signal

from llmkit.core.files import Disk


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Scripted(Disk):
    """Does `act` before the `at`-th write-class call; each piece of a file that is written is one, and its end."""

    def __init__(self, at=-1, act=kill):
        self.at, self.act, self.calls = at, act, 0

    def now(self):
        self.calls += 1
        if self.calls == self.at:
            self.act()

    def write(self, path, parts):
        for part in parts:
            self.now()
            with path.open("ab") as file:
                file.write(part)
        self.now()

    def make(self, folder):
        self.now()
        super().make(folder)

    def rename(self, old, new):
        self.now()
        super().rename(old, new)

    def sync(self, folder):
        self.now()
        super().sync(folder)

    def remove(self, path):
        self.now()
        super().remove(path)
