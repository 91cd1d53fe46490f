"""The table of faults: how often each was tried, how often what must hold held, how long the ranks took to end.

pytest -m "slow or not slow" -o junit_family=xunit1 --junitxml=faults.xml tests/distributed/test_faults.py ...
python benchmarks/fault_table.py faults.xml ...
"""

from __future__ import annotations

import sys
from collections import defaultdict
from statistics import median
from xml.etree import ElementTree


def read(paths: list[str]) -> dict[tuple[str, str], list[tuple[bool, float | None]]]:
    """(Test, its parameters) -> (whether it passed, seconds from the fault to the end of the last rank) of each run."""
    found = defaultdict(list)
    for path in paths:
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            if case.find("skipped") is not None:
                continue
            name, _, parameters = case.get("name", "").partition("[")
            told = [one.get("value") for one in case.iter("property") if one.get("name") == "seconds"]
            good = case.find("failure") is None and case.find("error") is None
            found[name, parameters.rstrip("]")].append((good, float(told[-1]) if told else None))
    return found


def table(found: dict[tuple[str, str], list[tuple[bool, float | None]]]) -> str:
    """A Markdown table, a test and its parameters a line."""
    lines = ["| case | of it | tried | held | seconds, median | longest |", "|---|---|---|---|---|---|"]
    for (name, parameters), runs in sorted(found.items()):
        seconds = [took for _, took in runs if took is not None]
        times = f"{median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -"
        held = sum(good for good, _ in runs)
        case = name.removeprefix("test_").replace("_", " ")
        lines.append(f"| {case} | {parameters or '-'} | {len(runs)} | {held} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read(sys.argv[1:])))
