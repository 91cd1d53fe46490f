"""Manifests: a plain Indexed Job, a PyTorchJob (Kubeflow's training operator), a TrainJob (Kubeflow's trainer).

In each pod `llmkit launch --engine torchrun` starts the ranks of one node, passes the pod's SIGTERM on to them, and
ends with the run's own exit status.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.launch.job import Job

GRACE = 600
"""Seconds that a pod has to save after SIGTERM."""
HOPELESS = [2, 3, 4, 5]
"""Exit statuses of what another try cannot mend: recipe, data, model, resources."""
Manifest = dict[str, Any]


def manifests(job: Job) -> list[Manifest]:
    """What `kubectl apply` takes.

    Raises:
        RecipeError: no such kind.
    """
    if job.kind not in KINDS:
        raise RecipeError(f"--kind {job.kind} is unknown", fix=f"use one of {', '.join(KINDS)}")
    return KINDS[job.kind](job)


def _restarts(job: Job) -> int:
    return 3 if job.restarts is None else job.restarts


def _command(job: Job, node: str, master: str, port: str) -> list[str]:
    """Of one node; `$(NAME)` is put in by Kubernetes."""
    said = ["--nodes", str(job.nodes), "--gpus", str(job.gpus)]
    said += ["--interface", job.interface] if job.interface else []
    if job.nodes > 1:
        said += ["--node-rank", node, "--master", master, "--port", port]
    return ["llmkit", "launch", "--engine", "torchrun", *said, *job.words]


def _resources(job: Job) -> Manifest:
    return {} if job.cpu else {"resources": {"limits": {"nvidia.com/gpu": job.gpus}}}


def _container(job: Job, name: str, command: list[str]) -> Manifest:
    held = [{"name": "work", "mountPath": "/work"}, {"name": "shm", "mountPath": "/dev/shm"}]
    made = {"name": name, "image": job.image, "command": command, "workingDir": "/work", "volumeMounts": held}
    return made | _resources(job)


def _pod(job: Job, container: Manifest, restart: str = "") -> Manifest:
    """One node: the claim at /work, and room that its processes share."""
    volumes = [
        {"name": "work", "persistentVolumeClaim": {"claimName": job.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    made = {"terminationGracePeriodSeconds": GRACE, "containers": [container], "volumes": volumes}
    return ({"restartPolicy": restart} if restart else {}) | made


def indexed(job: Job) -> list[Manifest]:
    """A Job of batch/v1, a pod a node, and the Service that gives its pods names."""
    name = job.label
    place = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container = _container(job, "node", _command(job, "$(NODE_RANK)", f"{name}-0.{name}", str(job.port)))
    container |= {"env": [{"name": "NODE_RANK", "valueFrom": place}]}
    rules = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": HOPELESS}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    spec = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": _restarts(job) * job.nodes,  # a lost rank ends the pods of all nodes
        "podFailurePolicy": {"rules": rules},
        "template": {
            "metadata": {"labels": {"app": name}},
            "spec": _pod(job, container, "Never") | {"subdomain": name},
        },
    }
    names = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        # a pod is found before it is ready: the ranks wait for each other
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": name}},
    }
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
    return [names, made] if job.nodes > 1 else [made]


def pytorch(job: Job) -> list[Manifest]:
    """A PyTorchJob of kubeflow.org/v1: the operator says to each pod which node it is."""
    command = _command(job, "$(PET_NODE_RANK)", "$(PET_MASTER_ADDR)", "$(PET_MASTER_PORT)")
    template = {"spec": _pod(job, _container(job, "pytorch", command))}
    replica = {"replicas": 1, "restartPolicy": "OnFailure", "template": template}
    replicas = {"Master": replica}
    if job.nodes > 1:
        replicas["Worker"] = replica | {"replicas": job.nodes - 1}
    spec = {
        "nprocPerNode": str(job.gpus),
        "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": _restarts(job) * job.nodes},
        "pytorchReplicaSpecs": replicas,
    }
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": job.label}, "spec": spec}]


def train(job: Job) -> list[Manifest]:
    """A TrainJob of trainer.kubeflow.org/v1alpha1, and the runtime that it names."""
    api, name = "trainer.kubeflow.org/v1alpha1", job.label
    command = _command(job, "$(PET_NODE_RANK)", "$(PET_MASTER_ADDR)", "$(PET_MASTER_PORT)")
    container = _container(job, "node", command)
    pods = {"backoffLimit": 0, "template": {"spec": _pod(job, container, "Never")}}
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    jobs = [{"name": "node", "template": {"metadata": step, "spec": pods}}]
    runtime = {
        "mlPolicy": {"numNodes": job.nodes, "torch": {"numProcPerNode": job.gpus}},
        "template": {"spec": {"failurePolicy": {"maxRestarts": _restarts(job)}, "replicatedJobs": jobs}},
    }
    asked = {"resourcesPerNode": _resources(job)["resources"]} if not job.cpu else {}
    spec = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
        "trainer": {"numNodes": job.nodes, "numProcPerNode": job.gpus, "image": job.image, "command": command} | asked,
    }
    return [
        {"apiVersion": api, "kind": "TrainingRuntime", "metadata": {"name": name}, "spec": runtime},
        {"apiVersion": api, "kind": "TrainJob", "metadata": {"name": name}, "spec": spec},
    ]


KINDS: dict[str, Callable[[Job], list[Manifest]]] = {"job": indexed, "pytorchjob": pytorch, "trainjob": train}
