"""Manifests against the schemas of what takes them, and what their commands say."""

import copy

import pytest
import yaml
from jsonschema import ValidationError, validate

from llmkit.core.errors import RecipeError
from llmkit.launch.job import Job
from llmkit.launch.kubernetes import KINDS, manifests
from llmkit.recipe.shipped import folder
from tests.launch.schemas import SCHEMAS


def checked(found):
    made = list(found)
    for one in made:
        validate(one, SCHEMAS[one["kind"]])
    return {one["kind"]: one for one in made}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 64])
@pytest.mark.parametrize("cpu", [False, True])
def test_manifests_fit_their_schemas(kind, nodes, cpu):
    job = Job("recipes/My recipe_8B.yaml", ("seed=1",), nodes, 8, cpu, interface="eth0", kind=kind)
    made = checked(yaml.safe_load_all(yaml.safe_dump_all(manifests(job))))
    text = yaml.safe_dump(list(made.values()))
    assert ("nvidia.com/gpu" in text) is not cpu and "my-recipe-8b" in text


def test_every_node_is_there_and_knows_which_it_is():
    job = Job("r.yaml", ("seed=1",), 4, 8, restarts=2)
    made = checked(manifests(job))
    spec, names = made["Job"]["spec"], made["Service"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (4, 4, 8)
    assert names["spec"]["selector"] == spec["template"]["metadata"]["labels"]
    assert names["metadata"]["name"] == spec["template"]["spec"]["subdomain"] == "r"
    command = spec["template"]["spec"]["containers"][0]["command"]
    assert " ".join(command) == (
        "llmkit launch --engine torchrun --nodes 4 --gpus 8 "
        "--node-rank $(NODE_RANK) --master r-0.r --port 29500 r.yaml seed=1"
    )
    replicas = checked(manifests(Job("r.yaml", (), 4, 8, kind="pytorchjob")))["PyTorchJob"]["spec"][
        "pytorchReplicaSpecs"
    ]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 3}
    both = checked(manifests(Job("r.yaml", (), 4, 8, kind="trainjob")))
    assert both["TrainJob"]["spec"]["runtimeRef"]["name"] == both["TrainingRuntime"]["metadata"]["name"]
    assert both["TrainJob"]["spec"]["trainer"]["numNodes"] == 4


def test_the_schemas_refuse_what_is_wrong():
    good = manifests(Job("r.yaml", (), 2, 8))[1]
    for change in (
        lambda m: m["spec"].update(completionMode="indexed"),
        lambda m: m["spec"].update(podFailurePolicies={}),
        lambda m: m["spec"]["template"]["spec"].update(restartPolicy="OnFailure"),
        lambda m: m["spec"]["template"]["spec"]["containers"][0].update(command="llmkit"),
        lambda m: m["metadata"].update(name="8b"),
        lambda m: m["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=[0]),
    ):
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises(ValidationError):
            validate(bad, SCHEMAS["Job"])
    named = manifests(Job("r.yaml", (), 2, 8, kind="pytorchjob"))[0]
    named["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["name"] = "node"
    with pytest.raises(ValidationError):
        validate(named, SCHEMAS["PyTorchJob"])


def test_an_unknown_kind_is_refused():
    with pytest.raises(RecipeError, match="--kind mpijob is unknown; fix: use one of job, pytorchjob, trainjob"):
        manifests(Job("r.yaml", kind="mpijob"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_in_launch_are_what_the_command_prints(kind):
    path = folder("launch") / "kubernetes" / f"{kind}.yaml"
    made = list(yaml.safe_load_all(path.read_text()))
    checked(made)
    assert made == manifests(Job("recipe.yaml", (), 2, 8, kind=kind))
