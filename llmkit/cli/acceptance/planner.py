"""What `llmkit plan` says of the run that was measured: its peak, and how long a step takes."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from llmkit.cli.acceptance.equality import said, train_lines
from llmkit.cli.acceptance.made import LEFT_OUT, node, words
from llmkit.cli.acceptance.scaling import speed
from llmkit.cli.acceptance.trials import Kit
from llmkit.cli.acceptance.verdict import Check, at_most, skipped
from llmkit.models.safe import read_json
from llmkit.plan.devices import recognised
from llmkit.stages.planned import Planned, planned

TINY = [*said({"strategy": "single"}), "steps=3"]


def planner(kit: Kit) -> list[Check]:
    """Predicted beside measured, of the run on all ranks that `scaling` made."""
    if not kit.main(lambda: bool(kit.told.get("speed"))):
        return [skipped("all", "it is judged by the run of `scaling` on all ranks, which there is not")]
    if kit.device == "cpu" and kit.recipe is None and not kit.main(lambda: (_alone(kit) / "metrics.jsonl").is_file()):
        kit.trial(words(kit, "tiny", TINY, _alone(kit).name), 1)
    found: list[dict[str, Any]] = kit.main(lambda: [vars(check) for check in (_peak(kit), _step(kit))])
    return [Check(**one) for one in found]


def _peak(kit: Kit) -> Check:
    """Of what a GPU's allocator gave at most; on a CPU of resident memory, less that of a run whose model is tiny."""
    name, folder = "peak memory", kit.work / f"speed-{kit.world}"
    measured = max(line["peak_memory_bytes"] for line in train_lines(folder))
    predicted = _reached(kit, "speed", kit.world)
    if kit.device == "cpu":
        if kit.recipe is not None or not (_alone(kit) / "metrics.jsonl").is_file():
            why = "resident memory holds Python and its libraries, and no run of a tiny model tells how much"
            return skipped(name, why)
        measured -= max(line["peak_memory_bytes"] for line in train_lines(_alone(kit)))
        predicted -= _reached(kit, "tiny", 1)
    off, mib = predicted / measured - 1, 2**20
    told = f"predicted {predicted / mib:.0f}, measured {measured / mib:.0f} MiB ({off:+.0%})"
    return at_most(name, abs(off), kit.bars.peak.limit, told)


def _reached(kit: Kit, kind: str, world: int) -> int:
    """Bytes until the last step is over, without what libraries take for themselves: a GPU's allocator does not know
    of it, and on a CPU two runs are compared."""
    account = _plan(kit, kind, world).choice.account
    return max(account.total, account.load) - account.base


def _step(kit: Kit) -> Check:
    name = "step time"
    if kit.device == "cpu":
        return skipped(name, "there is no data sheet for this processor")
    import torch

    known = torch.cuda.get_device_name()
    device = recognised(known)
    if device is None:
        return skipped(name, f"there is no data sheet for {known}")
    spent = _plan(kit, "speed", kit.world, device.name).times
    if spent is None:
        return skipped(name, "the plan has no times for it")
    measured = median(line["seconds"] for line in train_lines(kit.work / f"speed-{kit.world}")[LEFT_OUT:])
    off = spent.seconds / measured - 1
    told = f"predicted {spent.seconds:.3f}, measured {measured:.3f} s ({off:+.0%})"
    return at_most(name, abs(off), kit.bars.step.limit, told)


def _alone(kit: Kit) -> Path:
    """The run of a tiny model on one process: that of `equality`, if there was one."""
    return kit.work / "equal-0"


def _plan(kit: Kit, kind: str, world: int, where: str = "") -> Planned:
    more = TINY
    if kind == "speed":  # `auto` came to something in the run: the plan is made for that
        said = read_json(kit.work / f"speed-{world}" / "manifest.json")
        more = [*speed(kit, world), f"micro_batch={said['micro_batch']}", f"memory.recompute={said['recompute']}"]
    return planned(node(kit, kind, more), where or kit.device, world, 1 << 50)
