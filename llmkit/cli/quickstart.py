"""`llmkit quickstart`: the main job on a small model, from nothing."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.core.console import Console
from llmkit.core.types import interval
from llmkit.data.order import spread
from llmkit.recipe import shipped

MODEL = "smollm2-135m-instruct-q4"


def quickstart(out: str) -> None:
    """Evaluates, fine-tunes, evaluates again, and shows what changed."""
    from llmkit.recipe.execute import run
    from llmkit.recipe.load import load_recipe

    began = time.monotonic()
    console = Console()
    console.notice(f"fetching {MODEL}, and making a data set from this Python's own library")
    run(load_recipe(shipped.folder() / "quickstart.yaml", {"out": out}), console=console)
    _tell(Path(out), time.monotonic() - began)


def _tell(folder: Path, seconds: float) -> None:
    from llmkit.core import records
    from llmkit.core.metrics import Lines
    from llmkit.evals.run import compare

    tables = [
        list(records.read(folder / name / "predictions.jsonl", records.Prediction)) for name in ("before", "after")
    ]
    reports = [{e["metric"]: e for e in Lines(folder / name / "evals.jsonl").read()} for name in ("before", "after")]
    changes = {report.metric: report for report in compare(tables[1], tables[0])}
    _say("")
    table = [("held-out (95 % intervals)", "before", "after", "difference")]
    for metric, before in reports[0].items():
        last = _interval(vars(changes[metric])) if metric in changes else ""
        table.append((metric, _interval(before), _interval(reports[1][metric]), last))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        _say("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))
    _samples(*tables)
    _say(f"\n{seconds:.0f} s. Report: {folder / 'report.html'}\nNext:")
    for line in _next(folder):
        _say(f"  {line}")


def _interval(report: Any) -> str:
    return f"{report['value']:.3f} {interval(report['low'], report['high'], '.3f')}"


def _samples(before: Sequence[Any], after: Sequence[Any]) -> None:
    answered = [row for row in before if row.prediction]
    later = {row.example_id: row.prediction for row in after}
    for row in (answered[place] for place in spread(len(answered), 5)):
        name = row.text.split("def ", 1)[-1].split("(")[0]
        _say(f"\n{name}\n  expected  {_line(row.label)}\n  before    {_line(row.prediction)}")
        _say(f"  after     {_line(later[row.example_id])}")


def _line(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) < 110 else short[:107] + "..."


def _next(folder: Path) -> list[str]:
    example = "Describe in one sentence what this Python function does.\\n\\ndef area(r):\\n    return 3.14159 * r * r"
    program = _program()
    return [
        f"{program} chat {folder / 'tune'}",
        f"{program} generate {folder / 'tune'} $'{example}'",
        f"{program} recipes sft/lora && {program} run lora.yaml 'data.train=[{{kind: jsonl, path: YOURS.jsonl}}]'",
    ]


def _program() -> str:
    """What a shell here calls this program: its name where PATH leads to it, else its path."""
    called = Path(sys.argv[0])
    script = called if called.name == "llmkit" else Path(sys.executable).with_name("llmkit")
    found = shutil.which("llmkit")
    if found is not None and Path(found).resolve() == script.resolve():
        return "llmkit"
    return shlex.quote(str(script)) if script.is_file() else f"{shlex.quote(sys.executable)} -m llmkit"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
