"""How long `llmkit check` takes over many rows, read, linted and tokenised, and how its memory grows with them.

    python benchmarks/lint.py [--rows 100000] [--rounds 5] [--dedup none|exact|minhash]

The rows are chats made from a seed out of the running Python's own docstrings: real words, about 160 tokens a row. In
each round, a tenth of the rows and all of them are checked with lint, and all of them without, each in a process of
its own, over rows that no round before it had. Time is that of the whole command, memory the largest sum over all of
its processes.
"""

import argparse
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from llmkit.data.docstrings import read

RECIPE = """
kind: sft
model: smollm2-135m-instruct-q4
data:
  train: [{{kind: jsonl, path: {rows}}}]
  valid: [{{kind: jsonl, path: {valid}}}]
  lint: {lint}
  dedup: {dedup}
out: {folder}/run
"""


def sentences():
    """What the library's docstrings say, and the code under them."""
    found = []
    for raw in read("train"):
        found.append(raw.values["completion"][0]["content"])
        code = re.split(r"\n(?=\s*(?:def|for|if|return))", raw.values["prompt"][0]["content"])
        found += [" ".join(part.split()) for part in code]
    return [text for text in found if 20 < len(text) < 300]


def write(path, count, said, seed):
    """Rows of one or two exchanges."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = []
            for _ in range(draw.choice((1, 1, 2))):
                asked = f"{draw.choice(said)} {draw.choice(said)} ({seed}.{number})"
                turns += [{"role": "user", "content": asked}]
                answer = " ".join(draw.choices(said, k=draw.randint(1, 5)))
                turns += [{"role": "assistant", "content": f"{answer} Done."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def check(recipe):
    """(seconds, peak bytes over all processes, what was said) of one `llmkit check`."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "llmkit", "check", str(recipe)]
        child = subprocess.Popen(command, stdout=said, stderr=said)
        watched = psutil.Process(child.pid)
        while child.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(p.memory_info().rss for p in [watched, *watched.children(recursive=True)]))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        said.seek(0)
        text = said.read().decode()
    if child.returncode:
        sys.exit(text)
    return seconds, peak, text


def main():
    """Prints a line a case: median seconds, rows a second, peak memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dedup", default="none")
    asked = parser.parse_args()
    cases = {"a tenth": (asked.rows // 10, "warn"), "all": (asked.rows, "warn"), "all, no lint": (asked.rows, "off")}
    with tempfile.TemporaryDirectory() as held:
        folder, said = Path(held), sentences()
        write(folder / "valid.jsonl", max(1, asked.rows // 100), said, 1)
        measured = {name: [] for name in cases}
        for number in range(asked.rounds):
            for name, (count, lint) in cases.items():
                # other rows each round: what is kept of a round before is of no use to it
                write(folder / "rows.jsonl", count, said, 2 + number * len(cases) + list(cases).index(name))
                more = {"rows": folder / "rows.jsonl", "valid": folder / "valid.jsonl", "folder": folder}
                (folder / "recipe.yaml").write_text(RECIPE.format(lint=lint, dedup=asked.dedup, **more))
                measured[name].append(check(folder / "recipe.yaml"))
        print(measured["all"][-1][2])
        for name, runs in measured.items():
            seconds, peak = statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)
            rate = cases[name][0] / seconds
            print(f"{name:14} {cases[name][0]:8} rows  {seconds:7.1f} s  {rate:7.0f} rows/s  {peak / 2**20:7.0f} MiB")


if __name__ == "__main__":
    main()
