"""What a proof comes to: checks, parts of them, one JSON object and a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]
FORMAT = 1


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; what could not run is skipped, with the reason, and never passed."""

    name: str
    status: Status
    measured: float | None = None
    limit: float | None = None
    why: str = ""
    """What was found, or why it could not run."""


def at_most(name: str, measured: float, limit: float, why: str = "") -> Check:
    """Passed where `measured` is no more than the limit; what is no number fails."""
    return Check(name, "passed" if measured <= limit else "failed", measured, limit, why)


def at_least(name: str, measured: float, limit: float, why: str = "") -> Check:
    """Passed where `measured` is no less than the limit."""
    return Check(name, "passed" if measured >= limit else "failed", measured, limit, why)


def holds(name: str, true: bool, why: str = "") -> Check:
    """Passed where something is so."""
    return Check(name, "passed" if true else "failed", why=why)


def skipped(name: str, why: str) -> Check:
    """What could not run."""
    return Check(name, "skipped", why=why)


def part(checks: Sequence[Check], seconds: float) -> dict[str, Any]:
    """A part's status: failed if a check failed, passed if one passed and none failed, else skipped."""
    found = {check.status for check in checks}
    status: Status = "failed" if "failed" in found else "passed" if "passed" in found else "skipped"
    why = "" if status != "skipped" else next((check.why for check in checks), "nothing to check")
    return {"status": status, "why": why, "seconds": seconds, "checks": [asdict(check) for check in checks]}


def verdict(parts: dict[str, dict[str, Any]]) -> str:
    """`passed` if all parts are; `partial` if none failed and some were skipped."""
    found = {one["status"] for one in parts.values()}
    return "failed" if "failed" in found or "passed" not in found else "passed" if found == {"passed"} else "partial"


def lines(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table."""
    for name, one in parts.items():
        why = f": {one['why']}" if one["why"] else ""
        yield f"{name}: {one['status']} in {one['seconds']:.0f} s{why}"
        for check in one["checks"]:
            figures = "" if check["measured"] is None else f"{check['measured']:10.3g}"
            figures += "" if check["limit"] is None else f" / {check['limit']:g}"
            yield f"  {check['status']:<8} {check['name']:<34} {figures:<20} {check['why']}".rstrip()
