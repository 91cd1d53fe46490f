"""Processes in which samples are scored: whatever one of them does, this process goes on.

Each is a new interpreter (`worker.py`), told by lines of JSON. A sample that takes too long, or that is the end of its
process, has a fault in the place of a score; the next one meets a new process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmkit.core.errors import LlmkitError, RecipeError, ResourceError
from llmkit.core.readable import readable
from llmkit.rl.sample import UNREACHED, Fault, Sample, Score

START = 120.0
"""Seconds in which a process has to be ready: it may have much to import."""
MOST = 4
"""Processes of one reward, at most."""
Send = Callable[[Sample], Mapping[str, Any]]


class Workers:
    """The processes of one reward."""

    def __init__(self, opening: Mapping[str, Any], timeout: float, send: Send, count: int = 0) -> None:
        """`opening` is what a process is told first, `send` what it is told of a sample; `timeout` is of one sample, in
        seconds. The first process is started at once.

        Raises:
            LlmkitError: it cannot score anything.
        """
        self.count, self.send = count or max(1, min(MOST, len(os.sched_getaffinity(0)) - 1)), send
        self.workers = [Worker(opening, timeout) for _ in range(self.count)]
        self.pool = ThreadPoolExecutor(self.count, "llmkit-reward")
        self.workers[0].begin()

    def each(self, samples: Sequence[Sample], stop: bool) -> list[Score]:
        """The score of each by itself. With `stop`, nothing is scored behind one that was the end of its process."""
        said = [json.dumps(self.send(one), default=str) for one in samples]
        size = max(1, -(-len(said) // self.count))
        parts = [said[at : at + size] for at in range(0, len(said), size)]
        for worker, _ in zip(self.workers, parts, strict=False):
            worker.begin()  # in this thread: a process ends with the thread that started it
        made = self.pool.map(lambda at: self.workers[at].each(parts[at], stop), range(len(parts)))
        return [score for part in made for score in part]

    def together(self, samples: Sequence[Sample]) -> list[Score]:
        """The scores of one call for all. Where it fails each is tried alone, to find those that it fails of; the
        others are scored anew, in one call again: what a function gives to one alone may be another thing."""
        said = [json.dumps(self.send(one), default=str) for one in samples]
        whole = self._call(said)
        if not isinstance(whole, Fault):
            return whole
        if whole.certain or len(said) == 1:
            return [whole] * len(said)
        alone = [self._call([one]) for one in said]
        faults = {at: made for at, made in enumerate(alone) if isinstance(made, Fault)}
        if not faults:
            why = f"{whole.why}, with {len(said)} samples and with none of them alone"
            return [Fault(why, certain=True)] * len(said)
        rest = [one for at, one in enumerate(said) if at not in faults]
        again = self._call(rest) if rest else []
        if isinstance(again, Fault):
            why = f"{again.why}, also without the {len(faults)} of {len(said)} samples that it fails of alone"
            again = [Fault(why, again.fix, certain=True)] * len(rest)
        scored = iter(again)
        return [faults[at] if at in faults else next(scored) for at in range(len(said))]

    def _call(self, said: Sequence[str]) -> list[Score] | Fault:
        worker = self.workers[0]
        worker.begin()
        return worker.together(said)

    def close(self) -> None:
        """Ends them."""
        self.pool.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.close()


class Worker:
    """One process, or none yet."""

    def __init__(self, opening: Mapping[str, Any], timeout: float) -> None:
        self.opening, self.timeout = json.dumps(opening), timeout
        self.process: subprocess.Popen[bytes] | None = None
        self.rest = b""

    def begin(self) -> None:
        """There is a process when this returns.

        Raises:
            LlmkitError: it does not become ready; what it says of that is told.
        """
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        command = [sys.executable, "-m", "llmkit.rl.worker", str(os.getpid())]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        except OSError as cause:
            what = f"no process to score in could be started ({cause.strerror or cause})"
            raise ResourceError(what, fix="free some memory or processes", key="reward") from cause
        said = self._asked(self.opening, START)
        if isinstance(said, Fault):
            raise ResourceError(f"the process to score in {said.why} as it began", fix=said.fix, key="reward")
        if "error" in said:
            self.close()
            raise _error(said)

    def each(self, samples: Sequence[str], stop: bool) -> list[Score]:
        """A score or a fault for each."""
        made: list[Score] = []
        while len(made) < len(samples):
            self.begin()
            made += self._until_death(samples[len(made) :])
            if self.process is None and stop:
                return made + [UNREACHED] * (len(samples) - len(made))
        return made

    def _until_death(self, samples: Sequence[str]) -> list[Score]:
        """Scores up to the first sample that is the end of the process, whose fault is the last."""
        made: list[Score] = []
        said = self._asked(f"[{','.join(samples)}]", self.timeout)
        while True:
            made.append(said if isinstance(said, Fault) else _score(said))
            if isinstance(said, Fault) or len(made) == len(samples):
                return made
            said = self._heard(self.timeout)

    def together(self, samples: Sequence[str]) -> list[Score] | Fault:
        """A score for each, or why there are none."""
        said = self._asked(f"[{','.join(samples)}]", self.timeout)
        if isinstance(said, Fault):
            return said
        if "fault" in said:
            return Fault(said["fault"], said["fix"], said["certain"])
        return [_score({"score": score}) for score in said["scores"]]

    def close(self) -> int:
        """Ends the process; gives how it ended."""
        if self.process is None:
            return 0
        process, self.process, self.rest = self.process, None, b""
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        return process.wait()

    def _asked(self, line: str, seconds: float) -> dict[str, Any] | Fault:
        if self.process is None or self.process.stdin is None:
            raise RuntimeError("a process is asked that was not begun")
        sent = memoryview(line.encode() + b"\n")
        try:
            while sent:
                sent = sent[self.process.stdin.write(sent) or 0 :]
        except BrokenPipeError:
            return self._dead()
        return self._heard(seconds)

    def _heard(self, seconds: float) -> dict[str, Any] | Fault:
        """The next line that it says."""
        until = time.monotonic() + seconds
        while b"\n" not in self.rest:
            out = self.process.stdout if self.process is not None else None
            if out is None or not readable(out, until - time.monotonic()):
                self.close()
                return Fault(
                    f"took more than {seconds:g} s", "raise timeout, or say in `failed` what such a sample gets"
                )
            part = out.read(1 << 16)
            if not part:
                return self._dead()
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def _dead(self) -> Fault:
        code = self.process.wait(5) if self.process is not None else 0
        self.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return Fault(f"ended its process ({how})", "mend the reward, or say in `failed` what such a sample gets")


def _score(said: Mapping[str, Any]) -> Score:
    return float(said["score"]) if "score" in said else Fault(said["fault"], said["fix"], said["certain"])


def _error(said: Mapping[str, Any]) -> LlmkitError:
    kind = {RecipeError.code: RecipeError, ResourceError.code: ResourceError}.get(said["code"], ResourceError)
    return kind(said["error"], fix=said["fix"], key=said["key"])
