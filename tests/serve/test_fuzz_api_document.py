"""The server under requests that schemathesis makes of its own document, sound and unsound, NUL bytes among them."""

from __future__ import annotations

import os

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.serve.judged import HANGS, held
from tests.serve.test_fuzz_api import CHIEF, KEY, canary, fuzzed

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install 'llmkit[dev]'")
from schemathesis import checks
from schemathesis.generation import GenerationMode

__all__ = ["fuzzed"]
HELD = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


def operations(url, key):
    document = httpx.get(url + "/openapi.json", headers={"authorization": f"Bearer {key}"}).json()
    for path in ("/admin/pause",):  # all that follows would wait
        document["paths"].pop(path, None)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.allow_x00 = True
    return [one.ok() for one in schema.get_all_operations()]


def run(server, count):
    """`count` cases over all operations of both listeners; gives statuses and the slowest."""
    known, statuses, slowest, done = canary(server), {}, (0.0, ""), [0]
    checks.load_all_checks()
    wanted = checks.CHECKS.get_by_names(HELD)

    def attempt(operation, mode, url, key, share):
        @seed(share)
        @settings(
            max_examples=share,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def one(case):
            nonlocal slowest
            said = case.call(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
            case.validate_response(said, checks=wanted)
            assert said.elapsed < HANGS
            statuses[said.status_code] = statuses.get(said.status_code, 0) + 1
            slowest = max(slowest, (said.elapsed, operation.label))
            done[0] += 1
            if done[0] % 100 == 0:
                assert canary(server) == known

        one()

    both = [(server.url, KEY), (server.admin, CHIEF)]
    made = [(operation, url, key) for url, key in both for operation in operations(url, key)]
    for operation, url, key in made:
        for mode in GenerationMode if operation.body else (GenerationMode.POSITIVE,):  # else nothing can be unsound
            attempt(operation, mode, url, key, max(1, count // (2 * len(made))))
    assert canary(server) == known and not held(server) and not server.engine.restarts
    return done[0], statuses, slowest


def test_what_the_document_allows_and_what_it_does_not(fuzzed):
    count, statuses, _ = run(fuzzed, 60)
    assert count >= 30 and statuses[200] and statuses[400]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_of_the_document(fuzzed):
    count, statuses, slowest = run(fuzzed, int(os.environ.get("LLMKIT_FUZZ", "10000")))
    print(f"{count} cases: {statuses}; the slowest: {slowest}")
