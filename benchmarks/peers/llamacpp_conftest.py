"""What each test of llama.cpp's server came to, written beside them as `results.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import utils

RESULTS: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def noted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Notes begin anew."""
    utils.NOTES.clear()
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """One line for each test that was run."""
    made = (yield).get_result()  # type: ignore[misc]
    if call.when == "call" or not made.passed:
        why = str(call.excinfo.value).splitlines()[:1] if call.excinfo else []
        notes = [*utils.NOTES, *(f"ends: {made.longreprtext.splitlines()[-1][:200]}: {one}" for one in why)]
        RESULTS.append({"file": item.path.name, "test": item.name, "skipped": made.skipped, "notes": notes})


def pytest_sessionfinish() -> None:
    """The results, and no server is left."""
    Path(os.environ["RESULTS"]).write_text(json.dumps(RESULTS))
    for process, _ in utils.RUNNING.values():
        process.terminate()
    for process, _ in utils.RUNNING.values():
        process.wait(30)
