"""`llmkit prove cluster`: what it judges and how; and that it finds a fault that was planted."""

import json
import signal
import sys
import time
from dataclasses import replace

import pytest

from llmkit.cli.acceptance import equality, faults, verb
from llmkit.cli.acceptance.bars import Bar, Bars
from llmkit.cli.acceptance.equality import ways
from llmkit.cli.acceptance.faults import _after_a_kill, _after_a_stop
from llmkit.cli.acceptance.trials import Ended, Kit, Strike
from llmkit.cli.acceptance.verdict import at_most, part, skipped, verdict
from llmkit.core.files import write_json
from llmkit.core.peers import Alone
from llmkit.core.ranks import Ranks, ranks
from tests.distributed import ended, launched

SHORT = replace(Bars(), grace=Bar(1.0, ""), efficiency={"cpu": Bar(0.0, "this machine does other things too")})
PLANTED = """
import sys, time
import llmkit.parallel.ddp as ddp
from llmkit.parallel.watch import Watch
real = ddp._sum
if sys.argv.pop(1) == "gradient":
    ddp._sum = lambda group, phase, bucket: real(group, phase, bucket).then(lambda done: done.value().mul_(1.001))
else:
    Watch._end = Watch.lost = Watch.tell = lambda *_: time.sleep(3600)
from llmkit.cli.main import main
main()
"""


class Three(Alone):
    """Three ranks, as far as anybody asks."""

    ranks = Ranks(0, 3, 0, 3)


def statuses(checks):
    return [check.status for check in checks]


def test_what_is_skipped_is_never_passed():
    good, bad, none = at_most("a", 1.0, 2.0), at_most("b", float("nan"), 2.0), skipped("c", "no GPU")
    assert [part(c, 0.0)["status"] for c in ([good, none], [good, bad], [none], [])] == [
        "passed",
        "failed",
        "skipped",
        "skipped",
    ]
    assert part([none], 0.0)["why"] == "no GPU"
    made = {name: part(checks, 0.0) for name, checks in (("x", [good]), ("y", [none]), ("z", [bad]))}
    assert verdict(made) == "failed" and verdict({"x": made["x"]}) == "passed"
    assert verdict({"x": made["x"], "y": made["y"]}) == "partial" and verdict({"y": made["y"]}) == "failed"


def test_each_way_fits_its_world():
    two, four = dict(ways(2)), dict(ways(4))
    assert "fsdp, 2 copies" not in two and {"fsdp, 2 copies", "fsdp x tensor 2", "fsdp x context 2"} <= set(four)
    assert {"ddp", "fsdp", "zero 1", "zero 2", "zero 3", "ddp x tensor 2", "context 2, ring"} <= set(two)


def test_a_kill_that_others_survive_well_and_badly(tmp_path):
    kit = Kit(Three(), tmp_path, "cpu", Bars())
    named = "rank 2 (host, pid 1) died in reduce, step 7"
    well = Ended([6, 6, -9], [1.5, 2.0, 0.0], ["", named, ""], True, [])
    assert statuses(_after_a_kill(kit, well)) == ["passed"] * 3
    hung = replace(well, codes=[6, -9, -9], after=[1.5, 60.0, 0.0], hung=[1])
    assert statuses(_after_a_kill(kit, hung)) == ["failed", "failed", "passed"]
    assert statuses(_after_a_kill(kit, replace(well, said=["", "rank 1 (host) died", ""])))[2] == "failed"
    assert statuses(_after_a_kill(kit, replace(well, codes=[0, 0, 0], struck=False))) == ["failed"]


def test_a_stop_that_saves_and_one_that_does_not(tmp_path):
    kit = Kit(Three(), tmp_path, "cpu", Bars())
    stopped = Ended([75, 0, 75], [1.0, 1.0, 2.0], ["", "", ""], True, [])
    (tmp_path / "checkpoints" / "step-7").mkdir(parents=True)
    write_json(tmp_path / "status.json", {"state": "stopped", "exit_code": 75, "step": 7})
    assert statuses(_after_a_stop(kit, stopped, tmp_path)) == ["passed"] * 3
    write_json(tmp_path / "status.json", {"state": "stopped", "exit_code": 75, "step": 8})
    assert statuses(_after_a_stop(kit, stopped, tmp_path)) == ["passed", "passed", "failed"]
    write_json(tmp_path / "status.json", {"state": "failed", "exit_code": 6, "step": 7})
    assert statuses(_after_a_stop(kit, stopped, tmp_path))[1] == "failed"


def test_a_trial_that_is_struck_and_one_that_does_not_end(tmp_path):
    kit = Kit(Alone(), tmp_path, "cpu", SHORT, command=(sys.executable, "-c"))
    done = kit.trial(["print(7); import sys; sys.exit('llmkit: error: KEY: is wrong; fix: mend it')"], 1)
    assert (done.codes, done.why, kit.said()) == ([1], "KEY: is wrong; fix: mend it", "7\n")
    sleeps = "import signal, time\n{}\nopen({!r}, 'w')\ntime.sleep(60)"
    for mask, code, hung in (("", -15, []), ("signal.signal(15, signal.SIG_IGN)", -9, [0])):
        there = tmp_path / f"there{code}"
        strike = Strike(there.exists, signal.SIGTERM, range(1), 0.3)
        begun = time.monotonic()
        found = kit.trial([sleeps.format(mask, str(there))], 1, strike)
        assert (found.codes, found.hung, found.struck) == ([code], hung, True) and time.monotonic() - begun < 30
        assert (found.after[0] >= 0.3) == bool(hung)


def test_what_cannot_be_proved(call):
    code, _, said = call("prove", "luck")
    assert code == 2 and "luck cannot be proved yet" in said
    code, _, said = call("prove", "cluster", "--only", "equality,luck")
    assert code == 2 and "luck is no part of a proof; fix: use --only collectives,equality,faults" in said
    code, _, said = call("prove", "recipe")
    assert code == 2 and "no recipe is named" in said


def test_one_rank_proves_nothing(tmp_path, capsys):
    assert verb.prove(ranks({}), "", [], tmp_path / "c.json", ["equality", "scaling"]) == 1
    said = json.loads((tmp_path / "c.json").read_text())
    assert said["verdict"] == "failed" and said["parts"]["equality"]["status"] == "skipped"
    assert "one rank has nobody to differ from" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def proved(world, tmp_path, wanted, plant="", bars=SHORT, seconds=1500.0):
    """What a kit of forked ranks leaves, and their exit status."""
    command = verb.COMMAND
    if plant:
        (tmp_path / "planted.py").write_text(PLANTED)
        command = (sys.executable, str(tmp_path / "planted.py"), plant)
    to, codes = tmp_path / "c.json", tmp_path / "codes"
    codes.mkdir()

    def work(rank):
        code = verb.prove(ranks(), "", [], to, wanted, bars=bars, command=command)
        (codes / f"{rank}-{code}").touch()

    assert ended(launched(world, work, tmp_path / "said.txt"), seconds) == [0] * world, (
        tmp_path / "said.txt"
    ).read_text()[-3000:]
    (code,) = {path.name.split("-")[1] for path in codes.iterdir()}
    return int(code), json.loads(to.read_text())


def failed(said, name):
    return {check["name"] for check in said["parts"][name]["checks"] if check["status"] == "failed"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("world", "wanted"), [(2, list(verb.PARTS)), (4, ["collectives", "equality", "faults"])], ids=["2", "4"]
)
def test_a_sound_machine_passes(world, wanted, tmp_path):
    code, said = proved(world, tmp_path, wanted)
    assert code == 0 and {said["parts"][name]["status"] for name in wanted} == {"passed"}, said["parts"]
    assert said["verdict"] == ("passed" if len(wanted) == len(verb.PARTS) else "partial")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wrong_gradient_is_found(tmp_path, monkeypatch):
    few = {"ddp": {"strategy": "ddp"}, "fsdp": {"strategy": "fsdp"}}
    monkeypatch.setattr(equality, "ways", lambda world: few.items())
    code, said = proved(2, tmp_path, ["equality"], "gradient")
    assert code == 1 and said["verdict"] == "failed" and failed(said, "equality") == {"ddp", "ddp: what was learned"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_survivor_that_hangs_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "LONG", (30, 3))
    code, said = proved(2, tmp_path, ["faults"], "hang")
    assert code == 1 and {"kill -9 of a rank: others end", "kill -9 of a rank: it is named"} <= failed(said, "faults")
