"""The loop of a contender: import it first, start, and `serve` what is asked a line at a time.

What libraries print goes to standard error; standard output holds one JSON line for the start, and one for each round.
"""

import json
import os
import sys

OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def say(told):
    """One line for whoever started this process."""
    print(json.dumps(told), file=OUT, flush=True)


def resident():
    """Bytes that the process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(started, once):
    """Tells `started`, then what `once` makes of each line."""
    say(started)
    for line in sys.stdin:
        say(once(json.loads(line)))
