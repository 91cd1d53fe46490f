"""The three records that carry a model from training to operation. Their fields are fixed here, and versioned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmkit.core.errors import DataError
from llmkit.core.types import Report

SCHEMA = 1
R = TypeVar("R", "Prediction", "RequestLog")


@dataclass(frozen=True)
class Prediction:
    """One row of a PredictionTable: what a model said about one example."""

    example_id: str
    cluster_id: str
    """Examples of one cluster are not independent: intervals resample clusters whole."""
    slices: Mapping[str, str] = field(default_factory=dict)
    """Columns to slice by."""
    label: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    prediction: str = ""
    text: str = ""
    """What was asked, as the model saw it: the tokens before the answer, as text."""
    weight: float = 1.0
    model_version: str = ""
    run_id: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True)
class RequestLog:
    """One served request."""

    request_id: str
    unit_id: str
    """Whom the experiment is about: a user, a session."""
    arm: str
    assignment_probability: float
    policy_version: str
    model_version: str
    adapter_version: str
    features: Mapping[str, float]
    """Of the prompt."""
    prompt_tokens: int
    completion_tokens: int
    arrived: float
    """Seconds since the epoch."""
    seconds_to_first_token: float
    seconds: float
    finish_reason: str
    shadow_of: str = ""
    outcome: float | None = None
    """Joined later."""
    schema: int = SCHEMA


@dataclass(frozen=True)
class Decision:
    """What a gate said, and why."""

    passed: bool
    reason: str
    action: str


@dataclass(frozen=True)
class GateSpec:
    """One rule for offline evaluation, promotion, canary and A/B stop alike."""

    metric: str
    direction: Literal["up", "down"]
    """Which way is better."""
    margin: float = 0.0
    """Non-inferiority: how much worse the metric's difference may be at the far end of its interval."""
    test: Literal["interval", "point"] = "interval"
    min_n: int = 1
    guardrails: tuple[GateSpec, ...] = ()
    action: str = "refuse"
    """What is done when the gate fails."""
    schema: int = SCHEMA

    def decide(self, reports: Iterable[Report]) -> Decision:
        """Judges differences (new - old) by metric; every guardrail must pass too."""
        table = {report.metric: report for report in reports}
        for gate in (*self.guardrails, self):
            if why := gate._failure(table.get(gate.metric)):
                return Decision(False, why, gate.action)
        return Decision(True, "", "")

    def _failure(self, report: Report | None) -> str:
        if report is None:
            return f"{self.metric} was not measured"
        if report.n < self.min_n:
            return f"{self.metric} rests on {report.n} examples, fewer than {self.min_n}"
        worst = {"up": report.low, "down": report.high}[self.direction] if self.test == "interval" else report.value
        if worst is None:
            return f"{self.metric} rests on one cluster, which gives no interval"
        loss = -worst if self.direction == "up" else worst
        if not loss <= self.margin:  # NaN fails
            return f"{self.metric} may be worse by {loss:.4g}, more than {self.margin:.4g}"
        return ""


def write(path: Path, rows: Iterable[Prediction | RequestLog]) -> None:
    """Rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read(path: Path, kind: type[R]) -> Iterator[R]:
    """Rows of a JSON lines file.

    Raises:
        DataError: a line is of another version, or has fields that are not known.
    """
    known = {item.name for item in dataclasses.fields(kind)}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            said: dict[str, Any] = json.loads(line)
            if said.get("schema") != SCHEMA or set(said) - known:
                what = f"is no {kind.__name__} of version {SCHEMA}"
                raise DataError(what, fix="use the version that wrote it", file=str(path), line=number)
            yield kind(**said)
