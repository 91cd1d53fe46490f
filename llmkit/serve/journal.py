"""The record of each request: a line of `requests.jsonl`, in files of bounded size. It holds no text and no key."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from llmkit.core.errors import ResourceError
from llmkit.core.files import refused
from llmkit.core.records import RequestLog
from llmkit.serve.generated import Account

LOG = logging.getLogger("llmkit.serve")


class Journal:
    """Appends records, and begins a new file when one is full; the oldest of more than `keep` goes."""

    def __init__(self, path: Path, most: int = 64 << 20, keep: int = 8) -> None:
        """
        Raises:
            ResourceError: the file cannot be written.
        """
        self.path, self.most, self.keep = path, most, keep
        self.lost = 0
        """Records that the disk refused."""
        self.file = self._open()

    def _open(self) -> BinaryIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.open("ab", buffering=0)
        except OSError as cause:
            raise refused(cause, "writing", self.path) from cause

    def write(self, record: RequestLog) -> None:
        """One more; a disk that refuses delays no answer: it is counted and told."""
        line = json.dumps(asdict(record), allow_nan=False).encode() + b"\n"
        try:
            if self.file.tell() >= self.most:
                self._turn()
            self.file.write(line)
        except (OSError, ResourceError) as cause:
            self.lost += 1
            LOG.error("a record of a request is lost", extra={"why": str(cause), "lost": self.lost})

    def _turn(self) -> None:
        """Where it fails the next record tries it again."""
        named = [self.path, *(self.path.with_name(f"{self.path.name}.{n}") for n in range(1, self.keep))]
        if self.path.exists():  # else the files were moved already, and the new one could not be opened
            for newer, older in reversed(list(pairwise(named))):
                if newer.exists():
                    newer.replace(older)
        fresh = self._open()
        self.file.close()
        self.file = fresh

    def close(self) -> None:
        """No more come."""
        self.file.close()


def record(account: Account, policy: str, weights: str, adapter: str) -> RequestLog:
    """What is kept of a request. There is one arm, and it is taken with probability 1, until somebody splits traffic.

    `policy` names what decides who gets which arm, `weights` and `adapter` are digests of what answered.
    """
    usage = account.usage
    return RequestLog(
        request_id=account.caller.id,
        unit_id=account.unit or account.caller.tenant,
        arm=account.adapter or "base",
        assignment_probability=1.0,
        policy_version=policy,
        model_version=f"{weights}+{account.version}" if account.version else weights,
        adapter_version=adapter,
        features={"prompt_tokens": float(usage.prompt), "cached_tokens": float(usage.cached), **account.features},
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        arrived=account.arrived,
        seconds_to_first_token=account.seconds if account.first is None else account.first,
        seconds=account.seconds if math.isfinite(account.seconds) else 0.0,
        finish_reason=account.finish,
    )
