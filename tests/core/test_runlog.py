"""What libraries say during a stage is in its `run.log`, once, without secrets, and not on the screen."""

import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings

import pytest

from llmkit import Sft, run
from llmkit.core import runlog
from llmkit.core.console import Console
from llmkit.core.environment import prepare
from llmkit.core.errors import ResourceError, Stopped
from llmkit.core.runlog import run_log
from llmkit.recipe.load import load_recipe
from llmkit.stages import build_training as stage

LIBRARY = logging.getLogger("peft.tuners")


def lines(folder):
    """(level, logger, text) of each line."""
    found = re.findall(
        r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ([A-Z]+) ([\w.]+): (.*)$", (folder / "run.log").read_text(), re.M
    )
    assert len(found) == len((folder / "run.log").read_text().splitlines())
    return found


def logged(folder, hide=str):
    return run_log(folder, hide)


def test_in_a_process_of_its_own_all_of_it_goes_to_the_file_and_without_a_log_to_the_screen(tmp_path):
    code = (
        "import logging, sys, warnings\n"
        "from contextlib import nullcontext\n"
        "from pathlib import Path\n"
        "from llmkit.core.runlog import run_log\n"
        "with run_log(Path('.'), str) if sys.argv[1] == 'log' else nullcontext():\n"
        "    import torch, transformers, peft, huggingface_hub\n"
        "    from transformers.utils import logging as theirs\n"
        "    theirs.get_logger('transformers.models').warning('of transformers')\n"
        "    for name in ('torch._dynamo', 'peft.tuners', 'huggingface_hub.x', 'bitsandbytes', 'another'):\n"
        "        logging.getLogger(name).warning('of ' + name)\n"
        "    warnings.warn('of Python', UserWarning)\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    said = {}
    for how in ("log", "none"):
        command = [sys.executable, "-c", code, how]
        said[how] = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    names = ["transformers", "torch._dynamo", "peft.tuners", "huggingface_hub.x", "bitsandbytes", "another", "Python"]
    assert said["log"].stderr == said["log"].stdout == ""
    assert all(f"of {name}" in said["none"].stderr for name in names)  # the control
    begun, *kept, ended = lines(tmp_path)
    assert [m[1] for _, _, text in kept if (m := re.match(r"(?:UserWarning: )?of ([\w.]+)", text))] == names
    assert {level for level, _, _ in kept} == {"WARNING"} and kept[-1][1] == "py.warnings"
    assert begun[1] == ended[1] == "llmkit" and (begun[2][:6], ended[2]) == ("begins", "ends")


def test_loggers_and_warnings_are_as_before_when_it_ends(tmp_path):
    other = logging.StreamHandler(sys.stderr)
    LIBRARY.addHandler(other)
    LIBRARY.propagate = False
    names = ("llmkit", "peft", "peft.tuners", "torch", "transformers", "")

    def now():
        loggers = [logging.getLogger(name) for name in names]
        return [(list(x.handlers), x.propagate, x.level) for x in loggers], warnings.showwarning, warnings.filters[:]

    before = now()
    try:
        with pytest.raises(ZeroDivisionError), logged(tmp_path):
            assert other not in LIBRARY.handlers and now() != before
            LIBRARY.warning("heard")
            raise ZeroDivisionError("x")
        assert now() == before
    finally:
        LIBRARY.removeHandler(other)
        LIBRARY.propagate = True
    assert lines(tmp_path)[1:] == [
        ("WARNING", "peft.tuners", "heard"),
        ("ERROR", "llmkit", "ZeroDivisionError: x"),
        ("INFO", "llmkit", "ends"),
    ]


def test_what_is_said_again_is_counted_and_what_is_too_much_too(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "MOST", 3)
    with logged(tmp_path):
        for i in range(8):
            LIBRARY.warning("the same")
            LIBRARY.warning("number %d", i)
            LIBRARY.info("details")
        for i in range(5):
            Console(quiet=True).notice(f"ours {i}")
        LIBRARY.warning("x" * 5000)
    texts = [text for _, _, text in lines(tmp_path)[1:]]
    assert texts[:8] == ["the same", "number 0", "number 1", *(f"ours {i}" for i in range(5))]
    assert texts[8:] == ["the same [8 times]", "7 further lines are left out", "ends"]


def test_a_record_is_one_line_without_secrets_whatever_it_holds(tmp_path):
    with logged(tmp_path, lambda text: text.replace("s3cret", "${env:WORD}")):
        LIBRARY.warning("a\nb\x1b[31m of %s and https://me:pass@host/x", "s3cret" * 2)
        warnings.warn("of s3cret", UserWarning, stacklevel=1)
        try:
            raise KeyError("s3cret")
        except KeyError:
            LIBRARY.exception("failed")
        LIBRARY.error("y" * 9999)
    texts = [text for _, _, text in lines(tmp_path)]
    assert texts[1] == r"a\nb\x1b[31m of ${env:WORD}${env:WORD} and https://***@host/x"
    assert texts[2].startswith("UserWarning: of ${env:WORD} (test_runlog.py:")
    assert texts[3] == "failed (KeyError('${env:WORD}'))" and len(texts[4]) == runlog.LONGEST


def test_a_librarys_slip_in_what_it_says_is_no_fault(tmp_path):
    said = {"name": "peft", "levelno": logging.WARNING, "levelname": "WARNING", "msg": "wrong %d", "args": ("x",)}
    runlog.RunLog(tmp_path / "run.log", str).handle(logging.makeLogRecord(said))
    assert lines(tmp_path) == [("WARNING", "peft", "wrong %d ('x',)")]


def test_times_go_on_when_the_wall_clock_leaps(tmp_path, monkeypatch):
    with logged(tmp_path):
        LIBRARY.warning("one")
        real = time.gmtime
        monkeypatch.setattr(time, "time", lambda: 0.0)
        monkeypatch.setattr(time, "gmtime", lambda at=0.0: real(at))
        LIBRARY.warning("two")
    stamps = [line.split()[0] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert stamps == sorted(stamps) and stamps[0][:4] > "2000"


def test_a_stop_is_no_error(tmp_path):
    with pytest.raises(Stopped), logged(tmp_path):
        raise Stopped("stopped by SIGTERM")
    assert lines(tmp_path)[1] == ("INFO", "llmkit", "stopped by SIGTERM")


def test_a_full_disk_is_told_to_us_and_never_to_a_library(tmp_path):
    path = tmp_path / "run.log"
    full = pytest.raises(ResourceError, match=r"writing .*run\.log failed: No space left on device; fix: free some")
    with full, logged(tmp_path):
        path.unlink()
        path.symlink_to("/dev/full")
        LIBRARY.warning("this raises nothing")
        warnings.warn("nor does this", UserWarning, stacklevel=1)
        with pytest.raises(ResourceError):
            Console(quiet=True).notice("but this does")
    path.unlink()
    with pytest.raises(ZeroDivisionError), logged(tmp_path):
        path.unlink()
        path.symlink_to("/dev/full")
        raise ZeroDivisionError  # the first fault is the one that is told
    with full, logged(tmp_path):
        raise AssertionError("not reached: the first line cannot be written")


@pytest.fixture
def chatty(monkeypatch):
    """Training that warns in every step."""
    real = stage._step_data

    def warned(job, contexts, index):
        warnings.warn("the weather in s3cret is bad", UserWarning, stacklevel=1)
        LIBRARY.warning("a step of %s", job.node.model.name)
        return real(job, contexts, index)

    monkeypatch.setattr(stage, "_step_data", warned)


def sft(tiny, rows, out):
    source = [{"kind": "jsonl", "path": str(rows)}]
    return Sft(model=str(tiny), data={"train": source}, steps=3, checkpoint={"every": 1}, out=str(out))


def test_a_stage_keeps_its_log_beside_what_it_made_and_goes_on_with_it(tiny, rows, tmp_path, chatty, capfd):
    node = sft(tiny, rows, tmp_path / "run")
    made = run(node, console=Console(quiet=True))
    said = capfd.readouterr().err
    assert "weather" not in said and "a step of" not in said and "examples of" in said
    kept = [text for _, _, text in lines(made.folder)]
    notices = [line.removeprefix("llmkit: ") for line in said.splitlines()]
    assert [text for text in kept if text in notices] == notices
    assert sum("weather" in text for text in kept) == 1 and f"a step of {tiny} [3 times]" in kept
    assert "run.log" not in made.manifest["files"]
    made.verify()
    before = (made.folder / "run.log").read_text()
    run(node, console=Console(quiet=True))  # done already: nothing is written
    assert (made.folder / "run.log").read_text() == before
    status = json.loads((made.folder / "status.json").read_text())
    (made.folder / "status.json").write_text(json.dumps(status | {"state": "running"}))
    made = run(node, console=Console(quiet=True))
    assert (made.folder / "run.log").read_text().startswith(before) and len(lines(made.folder)) > len(kept)
    made.verify()


def test_r8_what_a_recipe_read_from_the_environment_is_not_in_the_log(tiny, rows, tmp_path, chatty, monkeypatch):
    monkeypatch.setenv("WORD", "s3cret")
    monkeypatch.setenv("LONGER", "s3cret-and-more")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3cret").symlink_to(tiny)
    (tmp_path / "s3cret-and-more.jsonl").symlink_to(rows)
    (tmp_path / "r.yaml").write_text(
        "kind: sft\nmodel: '${env:WORD}'\nsteps: 2\nout: o\n"
        "data: {train: [{kind: jsonl, path: '${env:LONGER}.jsonl'}]}\n"
    )
    made = run(load_recipe("r.yaml"), console=Console(quiet=True))
    text = (made.folder / "run.log").read_text()
    assert "a step of ${env:WORD}" in text and "s3cret" not in text
    (tmp_path / "s3cret-and-more.jsonl").unlink()
    (made.folder / "status.json").write_text("{}")  # as if it had not ended
    with pytest.raises(Exception, match=r"\$\{env:LONGER\}\.jsonl"):
        run(load_recipe("r.yaml"), console=Console(quiet=True))
    text = (made.folder / "run.log").read_text()
    assert "${env:LONGER}.jsonl" in text and "-and-more" not in text


@pytest.mark.parametrize("kind", [UserWarning, FutureWarning])
def test_what_a_library_warns_of_is_on_no_screen_but_in_the_log(kind, tmp_path):
    def warned():
        warnings.warn_explicit("a key is missing", kind, "peft_model.py", 1, module="peft.peft_model")

    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        warned()
        assert len(shown) == 1  # the control
        prepare()
        warned()
        with run_log(tmp_path, str):
            warned()
    assert len(shown) == 1
    assert (tmp_path / "run.log").read_text().count("a key is missing") == 1


def test_a_library_that_gets_its_handler_midway_is_in_the_log_too(tmp_path, capsys):
    late = logging.getLogger("DeepSpeed")
    before = late.handlers, late.propagate, late.filters
    with run_log(tmp_path, str):
        late.propagate = False
        late.addHandler(logging.StreamHandler(sys.stdout))
        late.warning("no accelerator")
    assert capsys.readouterr().out == ""
    assert [line for line in lines(tmp_path) if "DeepSpeed" in line] == [("WARNING", "DeepSpeed", "no accelerator")]
    assert (late.handlers, late.propagate, late.filters) == before
