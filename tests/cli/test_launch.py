"""`llmkit launch` and `llmkit status`, without starting a rank."""

import fcntl
import json

import pytest
import yaml

from llmkit.core.files import write_json

RECIPE = "kind: sft\nmodel: m\ndata: {train: [{kind: jsonl, path: r.jsonl}]}\nsteps: 1\nout: o\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_commands_and_manifests_are_shown(recipe, call):
    code, said, _ = call("launch", "r.yaml", "--gpus", "2", "--print", "seed=1")
    assert code == 0 and said.endswith(
        "-m torch.distributed.run --nproc-per-node 2 --max-restarts 0 --standalone -m llmkit run r.yaml seed=1\n"
    )
    code, said, _ = call("launch", "r.yaml", "--accept", "optim.lr", "--resume", "never", "--allow-code", "--print")
    assert code == 0 and said.endswith("llmkit run r.yaml --accept=optim.lr --resume=never --allow-code\n")
    code, said, _ = call("launch", "r.yaml", "--engine", "slurm", "--gpus", "2", "--print", "--option=--qos=x")
    assert code == 0 and said.startswith("sbatch --job-name r ") and " --qos=x " in said
    code, said, _ = call("launch", "r.yaml", "--engine", "kubernetes", "--gpus", "2", "--nodes", "2", "--print")
    assert code == 0 and [one["kind"] for one in yaml.safe_load_all(said)] == ["Service", "Job"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "mpi"], "--engine mpi is unknown; fix: use one of torchrun, deepspeed, slurm, kubernetes"),
        (["--gpus", "0"], "Invalid value for '--gpus'"),
        (["--gpus", "8", "parallel.replicate=3"], "parallel.replicate: replicate 3 x shard 1 is 3, and there are 8"),
        (
            ["--nodes", "2", "parallel.strategy=single"],
            "parallel.strategy: single is one replica, and there are ranks for 2",
        ),
        (["--nodes", "2", "--hostfile", "hosts"], "the hostfile hosts is not there"),
        (["--nodes", "2"], "2 nodes and no hostfile"),
        (["--engine", "slurm", "modle=x"], "modle"),
        (["--engine", "kubernetes", "--kind", "pod", "--print"], "--kind pod is unknown"),
    ],
)
def test_what_cannot_be_started_is_one_error_and_starts_nothing(words, said, recipe, call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, out, error = call("launch", "r.yaml", *words)
    assert code == 2 and said in error and error.count("\n") == 1 and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(("engine", "program"), [("slurm", "sbatch"), ("kubernetes", "kubectl"), ("torchrun", "bash")])
def test_a_program_that_is_not_there_is_named(engine, program, recipe, call, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, error = call("launch", "r.yaml", "--engine", engine, "--gpus", "2")
    assert code == 2 and f"{program} is not installed here" in error and "--print" in error


@pytest.mark.parametrize(
    ("said", "code", "shown"),
    [
        ({"state": "done", "step": 9, "exit_code": 0}, 0, "done at step 9"),
        ({"state": "stopped", "step": 4, "exit_code": 75, "why": "SIGTERM"}, 75, "stopped at step 4: SIGTERM"),
        ({"state": "failed", "step": 4, "exit_code": 3, "why": "bad"}, 3, "failed at step 4: bad"),
        ({"state": "running", "step": 2}, 6, "running at step 2: no process holds it any more"),
        (None, 1, "absent at step 0"),
    ],
)
def test_status_says_and_exits_as_the_run_did(said, code, shown, recipe, call, tmp_path):
    (tmp_path / "o").mkdir()
    if said:
        write_json(tmp_path / "o" / "status.json", said)
    assert call("status", "r.yaml") == (code, f"o: {shown}\n", "")
    told = call("status", "o", "--json")
    assert told[0] == code and json.loads(told[1])["exit_code"] == code


def test_a_run_that_is_held_is_running(recipe, call, tmp_path):
    (tmp_path / "o").mkdir()
    write_json(tmp_path / "o" / "status.json", {"state": "running", "step": 2})
    with (tmp_path / "o" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call("status", "o") == (1, "o: running at step 2\n", "")


def test_a_pipelines_status_is_that_of_its_first_stage_that_is_not_done(call, tmp_path):
    stages = [{"name": name, "kind": "sft"} for name in "abc"]
    (tmp_path / "p").mkdir()
    write_json(tmp_path / "p" / "stages.json", {"stages": stages})
    for name, state in (("a", "done"), ("b", "stopped")):
        (tmp_path / "p" / name).mkdir()
        write_json(tmp_path / "p" / name / "status.json", {"state": state, "step": 1})
    assert call("status", "p")[:2] == (75, "p/b: stopped at step 1\n")
    write_json(tmp_path / "p" / "b" / "status.json", {"state": "done", "step": 1})
    assert call("status", "p")[:2] == (1, "p/c: absent at step 0\n")
    assert call("status", "p", "seed=1")[0] == 2
