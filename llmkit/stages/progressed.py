"""What the screen says of a step: the loss, and the figures by which a stage of this kind is followed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmkit.stages.job import Job

EVALUATED = ("valid.loss", "valid.accuracy", "valid.f1", "valid.reward")
"""Figures of an evaluation that are shown, of those that there are."""


def show(job: Job, line: Mapping[str, Any]) -> None:
    """A line of the metrics, on the screen."""
    if line["event"] == "evaluate":
        job.run.console.notice(f"step {line['step']}: {listed(line, EVALUATED)}")
        return
    figures = listed(line, ("loss", *job.node.shown))
    speed = f"{line['tokens_per_second']:.0f} tokens/s, peak {line['peak_memory_bytes'] / 2**30:.2f} GiB"
    job.run.console.step("training", line["step"], job.steps, f"{figures}, {speed}")


def listed(line: Mapping[str, Any], names: Iterable[str]) -> str:
    """Those of the figures that a line has, with their names."""
    return ", ".join(f"{name} {_short(line[name])}" for name in names if name in line)


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"  # a reward may be of any size
