"""Bandwidth of collectives, and what ranks have in common: the survey of `llmkit doctor --cluster`."""

from __future__ import annotations

import json
from typing import Any

from llmkit.cli.acceptance.trials import Kit
from llmkit.cli.acceptance.verdict import Check, at_least, holds, skipped
from llmkit.core.errors import PeerError
from llmkit.plan.devices import recognised


def collectives(kit: Kit) -> list[Check]:
    """The largest all-reduce beside the network's data sheet; ranks that differ, and slow ones."""
    if kit.world == 1:
        return [skipped("all", "one rank has nobody to send to")]
    ended = kit.trial(["doctor", "--cluster", "--json", "--disk", str(kit.work)], kit.world)
    if set(ended.codes) - {0, PeerError.code}:
        return [holds("survey", False, ended.why)]
    told: list[dict[str, Any]] = kit.main(lambda: [vars(check) for check in _judged(kit, json.loads(kit.said()))])
    return [Check(**one) for one in told]


def _judged(kit: Kit, found: dict[str, Any]) -> list[Check]:
    apart = [one["what"] for one in found["findings"] if one["disagree"]]
    slow = [one["what"] for one in found["findings"] if not one["disagree"]]
    alike = holds("ranks agree", not apart, "; ".join(apart) or "versions, code, clocks")
    pace = holds("no slow rank", not slow, "; ".join(slow) or "each at 75 % of the median or more")
    if slow and kit.device == "cpu":
        pace = skipped("no slow rank", f"ranks share cores: {'; '.join(slow)}")
    return [alike, pace, _bandwidth(kit, found)]


def _bandwidth(kit: Kit, found: dict[str, Any]) -> Check:
    largest = found["collectives"][-1]
    rate, bar = largest["gb_per_second"], kit.bars.bandwidth[kit.device]
    name, said = f"all-reduce of {largest['bytes'] >> 20} MiB", f"{1e3 * largest['seconds']:.1f} ms"
    if kit.device == "cpu":
        return at_least(name, rate, bar.limit, f"GB/s over the bus; {said}")
    device = recognised(found["ranks"][0]["facts"]["gpu"])
    if device is None:
        return Check(name, "skipped", rate, None, f"GB/s over the bus; {said}; there is no data sheet to judge it by")
    between = min(device.link, device.network * device.here)
    link = device.link if kit.world <= kit.peers.ranks.here else between
    return at_least(name, rate, bar.limit * link / 1e9, f"GB/s over the bus, of {link / 1e9:.0f}; {said}")
