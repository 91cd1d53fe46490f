"""A rank that is killed, and a run that is asked to stop: who is left ends soon, names it, and the run goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from llmkit.cli.acceptance.equality import REFUSED, train_lines
from llmkit.cli.acceptance.made import LONG, LONG_OWN, words
from llmkit.cli.acceptance.trials import Ended, Kit, Strike
from llmkit.cli.acceptance.verdict import Check, at_most, holds, skipped
from llmkit.cli.prove import apart
from llmkit.core.folder import read_status, steps


def faults(kit: Kit) -> list[Check]:
    """One run whole; another one killed, resumed, stopped and resumed; both must come to the same."""
    if kit.world == 1:
        return [skipped("all", "one rank has nobody that is left")]
    long, often = LONG if kit.recipe is None else LONG_OWN
    more = [f"steps={long}", f"checkpoint.every={often}"]
    control = kit.trial(words(kit, "tiny", more, "whole"), kit.world)
    if not control.well:
        refused = set(control.codes) <= {*REFUSED} and not control.hung
        return [skipped("all", control.why) if refused else holds("a run without a fault", False, control.why)]
    bars, folder, command = kit.bars, kit.work / "struck", words(kit, "tiny", more, "struck")
    last = kit.world - 1
    within = bars.notice.limit + bars.grace.limit
    killed = kit.trial(command, kit.world, Strike(_saved(folder, often), signal.SIGKILL, range(last, last + 1), within))
    checks = list(_after_a_kill(kit, killed))
    after, within = _saved(folder, 2 * often + often), bars.stop.limit + bars.grace.limit
    stopped = kit.trial(command, kit.world, Strike(after, signal.SIGTERM, range(kit.world), within))
    checks += _after_a_stop(kit, stopped, folder)
    resumed = kit.trial(command, kit.world)
    if not resumed.well:
        return [*checks, holds("resume", False, resumed.why)]
    return [*checks, *_whole(kit, folder, long)]


def _saved(folder: Path, least: int) -> Callable[[], bool]:
    """Whether the run that goes on has a checkpoint of that step or a later one, and is in a step again."""

    def so() -> bool:
        found = steps(folder / "checkpoints")
        return bool(found) and found[0] >= least and read_status(folder).get("state") == "running"

    return so


def _after_a_kill(kit: Kit, ended: Ended) -> list[Check]:
    name, last = "kill -9 of a rank", kit.world - 1
    if not ended.struck or ended.codes[last] != -signal.SIGKILL:
        return [holds(name, False, f"it ended before it was struck: {ended.why}")]
    left = ended.codes[:last]
    told = next(filter(None, ended.said[:last]), "")
    return [
        at_most(f"{name}: others end", max(ended.after[:last]), kit.bars.notice.limit, "seconds"),
        holds(f"{name}: exit status 6", set(left) == {6}, f"exit statuses {', '.join(map(str, left))}"),
        holds(f"{name}: it is named", told.startswith(f"rank {last} ("), told or "nobody said a word"),
    ]


def _after_a_stop(kit: Kit, ended: Ended, folder: Path) -> list[Check]:
    name = "SIGTERM to all"
    if not ended.struck:
        return [holds(name, False, f"it ended before it was struck: {ended.why}")]
    said, kept = kit.main(lambda: [read_status(folder), steps(folder / "checkpoints")])
    status = f"status.json says {said.get('state')}, {said.get('exit_code')}"
    right = (said.get("state"), said.get("exit_code")) == ("stopped", 75) and set(ended.codes) <= {0, 75}
    return [
        at_most(f"{name}: all end", max(ended.after), kit.bars.stop.limit, "seconds"),
        holds(f"{name}: exit status 75", right, f"{status}; a launcher is told 0"),
        holds(f"{name}: saved", said.get("step") in kept[:1], f"at step {said.get('step')}"),
    ]


def _whole(kit: Kit, folder: Path, long: int) -> list[Check]:
    whole = kit.work / "whole"
    seen = kit.main(lambda: [line["step"] for line in train_lines(folder)])
    once = holds("resume: every step once", seen == list(range(1, long + 1)), f"{len(seen)} of {long} steps")
    if once.status == "failed":
        return [once]
    gap, weights = kit.main(lambda: apart(folder, whole))
    limit = kit.bars.resumed.limit
    return [once, at_most("resume: losses", gap, limit), at_most("resume: weights", weights, limit)]
