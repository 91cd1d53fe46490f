"""Ranks with a fault put in, and what they leave."""

import json
import os
import time

from llmkit import run
from llmkit.parallel.group import Group
from tests.distributed import QUIET, ended, launched

BAR = 10.0
"""Seconds that who is left may take to end."""


class Faults:
    """Ranks with a fault put in: where Group.phase is told a phase and a step, a rank does something."""

    def __init__(self, folder, record):
        self.said, self.struck, self.out = folder / "said.txt", folder / "struck", folder / "run"
        self.record = record

    def at(self, phase, what, rank=1, step=2):
        """Makes the fault, in a child."""

        def told(group, name, at=0):
            real(group, name, at)
            here = (name, group.ranks.rank) == (phase, rank) and group.watch.where.step >= step
            if here and not done:
                done.append(name)
                self.struck.write_text(str(time.monotonic()))
                what()

        done, real = [], Group.phase
        Group.phase = lambda *given: told(*given)

    def launch(self, world, make, fault=lambda rank: None, resume="auto", grants=None, **more):
        def work(rank):
            fault(rank)
            run(make(self.out, **more), console=QUIET, resume=resume, grants=grants)

        return launched(world, work, self.said)

    def codes(self, pids, seconds=250.0):
        """Exit codes, after proof that the fault took effect; and how long the others took to end."""
        codes = ended(pids, seconds)
        assert self.struck.exists(), "the fault never came"
        seconds = time.monotonic() - float(self.struck.read_text())
        self.record("seconds", f"{seconds:.2f}")
        return codes, seconds

    @property
    def errors(self):
        return [line for line in self.said.read_text().splitlines() if line.startswith("llmkit: error:")]

    @property
    def status(self):
        return json.loads((self.out / "status.json").read_text())

    @property
    def kept(self):
        return sorted(int(path.name[5:]) for path in (self.out / "checkpoints").glob("step-*"))


def stopping(number, times=1):
    def stop():
        for _ in range(times):
            os.kill(os.getpid(), number)

    return stop
