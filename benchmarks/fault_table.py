"""The table of faults: how often each was tried, how often what must hold held, how long the ranks took to end.

    pytest -m "slow or not slow" -o junit_family=xunit1 --junitxml=faults.xml tests/distributed/test_faults.py ...
    python benchmarks/fault_table.py [--each] faults.xml ...

With `--each` every variant of a test has a line of its own.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from statistics import median
from xml.etree import ElementTree

Runs = dict[tuple[str, str], list[tuple[bool, float | None]]]
"""(Test, its variant) -> of each time whether it passed, and the seconds from the fault to the end of the last rank."""


def read(paths: list[str]) -> Runs:
    """What junit's files say."""
    found: Runs = defaultdict(list)
    for path in paths:
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            if case.find("skipped") is not None:
                continue
            name, _, variant = case.get("name", "").partition("[")
            told = [one.get("value") for one in case.iter("property") if one.get("name") == "seconds"]
            good = case.find("failure") is None and case.find("error") is None
            found[name, variant.rstrip("]")].append((good, float(told[-1]) if told else None))
    return found


def table(found: Runs, each: bool) -> str:
    """In Markdown."""
    groups = defaultdict(list)
    for (name, variant), runs in sorted(found.items()):
        groups[name, variant if each else ""].append((variant, runs))
    lines = ["| case | variants | tried | held | seconds, median | longest |", "|---|---|---|---|---|---|"]
    for (name, _), some in groups.items():
        all_ = [one for _, runs in some for one in runs]
        seconds = [took for _, took in all_ if took is not None]
        times = f"{median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -"
        variants = ", ".join(variant for variant, _ in some) or "-"
        case = name.removeprefix("test_").replace("_", " ")
        lines.append(f"| {case} | {variants} | {len(all_)} | {sum(good for good, _ in all_)} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "--each"]
    print(table(read(given), "--each" in sys.argv))
