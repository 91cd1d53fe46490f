"""The server under requests that schemathesis makes of its own document, sound and unsound, NUL bytes among them."""

from __future__ import annotations

import os

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.serve.judged import HANGS
from tests.serve.test_fuzz_api import far, near

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install 'llmkit[dev]'")
from schemathesis import checks
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode

__all__ = ["far", "near"]
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


class Fire:
    """Cases of one operation after the other, with the canary beside each hundred."""

    def __init__(self, target, most):
        self.target, self.most, self.known = target, most, target.canary()
        self.count, self.statuses, self.slowest = 0, {}, (0.0, "")
        checks.load_all_checks()
        self.checks = checks.CHECKS.get_by_names(HELD)

    def run(self, count):
        """`count` over all operations of both listeners."""
        places = (self.target.url, self.target.key), (self.target.admin, self.target.chief)
        made = [(one, *place) for place in places for one in operations(*place)]
        bad = []
        for operation, url, key in made:
            for mode in GenerationMode if operation.body else (GenerationMode.POSITIVE,):  # else nothing can be unsound
                try:
                    self.attempt(operation, mode, url, key, max(1, count // len(made) // (1 + bool(operation.body))))
                except FailureGroup as cause:
                    bad.append(f"{operation.label}: {cause}")
        assert not bad, "\n".join(bad)
        assert self.target.canary() == self.known and not self.target.settled()

    def attempt(self, operation, mode, url, key, share):
        quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

        @seed(share)
        @settings(max_examples=share, phases=[Phase.generate], **quiet)
        @given(operation.as_strategy(generation_mode=mode))
        def one(case):
            self.judge(case, case.call(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60))

        one()

    def judge(self, case, said):
        case.validate_response(said, checks=self.checks)
        assert said.elapsed < self.most
        self.count += 1
        self.statuses[said.status_code] = self.statuses.get(said.status_code, 0) + 1
        self.slowest = max(self.slowest, (said.elapsed, case.operation.label))
        if self.count % 100 == 0:
            assert self.target.canary() == self.known


def test_what_the_document_allows_and_what_it_does_not(near):
    fire = Fire(near, 60.0)
    fire.run(50)
    assert fire.count >= 30 and fire.statuses[200] and fire.statuses[400]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_of_the_document(far):
    fire = Fire(far[0], HANGS)
    fire.run(int(os.environ.get("LLMKIT_FUZZ", "10000")))
    print(f"{fire.count} cases: {fire.statuses}; the slowest, of {HANGS} s: {fire.slowest}")
