"""A process that tries grammars, so that one that would take all time or memory takes this process alone.

It reads lines of JSON: first the tokenizer, then grammars; each is answered by a line with what is wrong with it, or an
empty text. A grammar is compiled and its first tokens are walked along, since the work is put off until then. Computing
time is bounded, not time on the clock: a busy machine refuses nothing.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np

from llmkit.inference.matching import SLOW, Match, begun, refused, vocabulary
from llmkit.inference.request import RequestError

SECONDS = 2
"""Of computing, for one grammar."""
MEMORY = 1 << 30
"""Bytes, beyond what the tokenizer takes."""
STEPS = 32
"""Tokens that are walked along."""
LATER = SLOW / 5
"""Seconds of computing for each mask after the first."""


def main() -> None:
    """Answers until its input ends."""
    given = json.loads(sys.stdin.readline())
    tokens = vocabulary(given["tokenizer"], given["words"], given["ends"])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    _say("")
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime) + SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        try:
            _walk(begun(tokens, json.loads(line)), given["words"])
        except RequestError as wrong:
            _say(wrong.problems[0].what)
        else:
            _say("")


def _walk(match: Match, words: int) -> None:
    """
    Raises:
        RequestError: a mask takes too long, or nothing can be made at all.
    """
    drawn = random.Random(0)
    for step in range(STEPS):
        began = time.process_time()
        mask = match.mask(words)
        if step and time.process_time() - began > LATER:
            raise refused(f"a token takes more than {LATER} s to find")
        if match.inner.is_stopped():
            return
        found = np.flatnonzero(mask)
        match.take(int(found[drawn.randrange(len(found))]))


def _say(what: str) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
