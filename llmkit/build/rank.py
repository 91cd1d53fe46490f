"""One of the ranks that hold a served model, other than the first: a process that the first one starts.

It writes an empty line when it is ready to be told, reads one line of JSON from standard input, comes to the group that
its environment names, and follows.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from llmkit.build.ranked import Spread, opened, rank_of
from llmkit.core.environment import prepare
from llmkit.core.errors import LlmkitError
from llmkit.core.ranks import ranks
from llmkit.inference.ranks import follow
from llmkit.models.resolve import resolve
from llmkit.parallel.group import joined


def main() -> int:
    """Gives the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the first rank to answer
    os.write(1, b"\n")
    os.dup2(2, 1)  # nobody reads it further
    said = json.loads(sys.stdin.readline())
    prepare()
    torch.set_num_threads(said["threads"])
    spread = Spread.heard(said["spread"])
    try:
        with joined(ranks(), said["device"], said["patience"], facts=said["facts"], serves=True) as group:
            follow(rank_of(opened(resolve(spread.model), spread), spread, group))
    except LlmkitError as error:
        if error.speaks is not False:
            os.write(2, "".join(f"llmkit: error: {problem}\n" for problem in error.problems).encode())
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
