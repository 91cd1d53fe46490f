"""What a job asks for, and hosts that do not have it."""

import re

import pytest

from llmkit.core.errors import RecipeError
from llmkit.launch.commands import hosts
from llmkit.launch.job import Job, check_hosts
from llmkit.recipe.shipped import folder

SCRIPTS = folder("launch")


@pytest.mark.parametrize(
    ("path", "label"),
    [("runs/My Recipe_8B.yaml", "my-recipe-8b"), ("8b.yaml", "run-8b"), ("___.yaml", "run"), ("a" * 99, "a" * 40)],
)
def test_a_label_is_a_dns_name(path, label):
    assert Job(path).label == label and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", label)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names 0 hosts, and --nodes is 2"),
        ("# a slots=8\na slots=8\n", "names 1 hosts, and --nodes is 2"),
        ("a slots=8\nb slots=4\n", "gives b 4 slots, and --gpus is 8; fix: use --gpus 4"),
        ("a slots=8\na slots=8\n", ":2: names a twice"),
        ("a slots=8\nb slot=8\n", ":2: says 'b slot=8'"),
        ("a slots=8 b\n", ":1: says"),
    ],
)
def test_a_hostfile_that_does_not_suffice_is_told(text, said, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_hosts(Job("r.yaml", (), 2, 8, hostfile=str(tmp_path / "hosts")))


def test_hosts_without_slots_and_more_than_needed_will_do(tmp_path):
    (tmp_path / "hosts").write_text("\n a\nb  slots=8 # the other\nc slots=1\n")
    check_hosts(Job("r.yaml", (), 2, 8, hostfile=str(tmp_path / "hosts")))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "2 nodes and no hostfile"),
        ({"node_rank": 1}, "2 nodes and no hostfile"),
        ({"hostfile": "nope"}, "the hostfile nope is not there"),
        ({"hostfile": "nope", "node_rank": 0}, "give one of the two"),
        ({"node_rank": 2, "master": "a"}, "--node-rank 2 of 2 nodes; fix: use 0 to 1"),
        ({"node_rank": -1, "master": "a"}, "--node-rank -1 of 2 nodes"),
        ({"node_rank": 0, "master": "a", "restarts": 2}, "deepspeed starts no ranks again"),
    ],
)
def test_what_contradicts_itself_is_refused(more, said):
    with pytest.raises(RecipeError, match=said):
        hosts(Job("r.yaml", (), 2, 8, **more), "deepspeed", SCRIPTS)


def test_the_hosts_command_says_what_the_job_says():
    job = Job("r.yaml", ("seed=1",), 2, 8, node_rank=0, master="10.0.0.1", interface="ib0", restarts=3)
    said = hosts(job, "torchrun", SCRIPTS)
    assert said[:2] == ["bash", str(SCRIPTS / "torchrun.sh")] and said[-2:] == ["r.yaml", "seed=1"]
    given = dict(zip(said[2:-2:2], said[3:-2:2], strict=True))
    assert given == {
        "--nodes": "2",
        "--gpus": "8",
        "--port": "29500",
        "--master": "10.0.0.1",
        "--interface": "ib0",
        "--node-rank": "0",
        "--restarts": "3",
    }
