"""One of the ranks that hold a served model, other than the first: a process that the first one starts.

It writes an empty line when it is ready to be told, reads one line of JSON from standard input, comes to the group that
its environment names, and follows. It is given the process of the first rank, and ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch

from llmkit.build.held import autocast
from llmkit.build.ranked import Spread, opened, rank_of
from llmkit.core.environment import prepare
from llmkit.core.errors import LlmkitError
from llmkit.core.lifeline import bound
from llmkit.core.ranks import ranks
from llmkit.inference.ranks import follow
from llmkit.models.resolve import resolve
from llmkit.parallel.group import joined


def serve(said: dict[str, Any]) -> int:
    """Follows the first rank until it says that it is over; gives the exit status."""
    torch.set_num_threads(said["threads"])
    spread = Spread.heard(said["spread"])
    try:
        with joined(ranks(), said["device"], said["patience"], facts=said["facts"], serves=True) as group:
            made = rank_of(opened(resolve(spread.model), spread), spread, group)
            with autocast(said["device"], spread.mixed):
                follow(made)
    except LlmkitError as error:
        if error.speaks is not False:
            os.write(2, "".join(f"llmkit: error: {problem}\n" for problem in error.problems).encode())
        return error.code
    return 0


def main(parent: int) -> int:
    """Gives the exit status."""
    bound(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # the first rank answers them, and ends the others when it is done
        signal.signal(number, signal.SIG_IGN)
    os.write(1, b"\n")
    os.dup2(2, 1)  # nobody reads it further
    said = json.loads(sys.stdin.readline())
    prepare()
    return serve(said)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
