"""What Kubernetes takes, as JSON schemas: the parts that our manifests use, and no field beside them.

Written from the public references, whose fields have these names, types and bounds:

- Job v1 batch, PodSpec and Service v1 core: https://kubernetes.io/docs/reference/kubernetes-api/
- PyTorchJob, kubeflow.org/v1: https://github.com/kubeflow/training-operator/blob/master/pkg/apis/kubeflow.org/v1/
  (`pytorch_types.go`, `common_types.go`)
- TrainJob and TrainingRuntime, trainer.kubeflow.org/v1alpha1:
  https://github.com/kubeflow/trainer/blob/master/pkg/apis/trainer/v1alpha1/
  (`trainjob_types.go`, `trainingruntime_types.go`)
- JobSet, jobset.x-k8s.io/v1alpha2: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
"""

NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
MORE = {"type": "integer", "minimum": 1}


def of(required=(), **fields):
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def some(items):
    return {"type": "array", "items": items, "minItems": 1}


def among(*values):
    return {"enum": list(values)}


LABELS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
META = of(["name"], name=NAME)
AMOUNTS = {
    "type": "object",
    "additionalProperties": {"anyOf": [MORE, {"type": "string", "pattern": "^[0-9.]+[A-Za-z]*$"}]},
}
RESOURCES = of(limits=AMOUNTS, requests=AMOUNTS)
ENV = of(["name"], name=TEXT, value={"type": "string"}, valueFrom=of(fieldRef=of(["fieldPath"], fieldPath=TEXT)))
MOUNT = of(["name", "mountPath"], name=NAME, mountPath={"type": "string", "pattern": "^/[^:]*$"})
CONTAINER = of(
    ["name", "image"],
    name=NAME,
    image=TEXT,
    command=some({"type": "string"}),
    workingDir=TEXT,
    env=some(ENV),
    resources=RESOURCES,
    volumeMounts=some(MOUNT),
)
VOLUME = of(
    ["name"],
    name=NAME,
    persistentVolumeClaim=of(["claimName"], claimName=NAME),
    emptyDir=of(medium=among("", "Memory"), sizeLimit=TEXT),
)
POD = of(
    ["containers"],
    restartPolicy=among("Always", "OnFailure", "Never"),
    terminationGracePeriodSeconds=COUNT,
    containers=some(CONTAINER),
    volumes=some(VOLUME),
    subdomain=NAME,
)
TEMPLATE = of(["spec"], metadata=of(labels=LABELS), spec=POD)

RULE = of(
    ["action"],
    action=among("FailJob", "FailIndex", "Ignore", "Count"),
    onExitCodes=of(
        ["operator", "values"],
        operator=among("In", "NotIn"),
        # 0 may not be `In`, and there are 255 at most
        values={"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 255}, "minItems": 1},
    ),
    onPodConditions=some(of(["type"], type=TEXT, status=among("True", "False", "Unknown"))),
)
# a policy of failures is for pods that are not restarted in place
JOB_SPEC = of(
    ["template"],
    completionMode=among("NonIndexed", "Indexed"),
    completions=MORE,
    parallelism=COUNT,
    backoffLimit=COUNT,
    podFailurePolicy=of(["rules"], rules={"type": "array", "items": RULE, "maxItems": 20}),
    template=TEMPLATE,
) | {
    "if": {"required": ["podFailurePolicy"]},
    "then": {
        "properties": {"template": {"properties": {"spec": {"properties": {"restartPolicy": {"const": "Never"}}}}}}
    },
}


def manifest(api, kind, spec):
    return of(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": api},
        kind={"const": kind},
        metadata=META,
        spec=spec,
    )


SERVICE = manifest("v1", "Service", of(clusterIP=TEXT, publishNotReadyAddresses={"type": "boolean"}, selector=LABELS))
JOB = manifest("batch/v1", "Job", JOB_SPEC)

REPLICA = of(
    ["template"],
    replicas=COUNT,
    restartPolicy=among("Always", "OnFailure", "Never", "ExitCode"),
    # the operator looks for a container of this name
    template=TEMPLATE
    | {
        "properties": TEMPLATE["properties"]
        | {
            "spec": POD
            | {
                "properties": POD["properties"]
                | {
                    "containers": some(
                        CONTAINER | {"properties": CONTAINER["properties"] | {"name": {"const": "pytorch"}}}
                    )
                }
            }
        }
    },
)
PYTORCH_JOB = manifest(
    "kubeflow.org/v1",
    "PyTorchJob",
    of(
        ["pytorchReplicaSpecs"],
        nprocPerNode={"type": "string", "pattern": "^(auto|cpu|gpu|[0-9]+)$"},
        runPolicy=of(
            cleanPodPolicy=among("All", "Running", "None"),
            backoffLimit=COUNT,
            activeDeadlineSeconds=MORE,
            ttlSecondsAfterFinished=COUNT,
        ),
        pytorchReplicaSpecs=of(Master=REPLICA, Worker=REPLICA),
    ),
)

ANCESTOR = {"trainer.kubeflow.org/trainjob-ancestor-step": {"const": "trainer"}}
REPLICATED = of(
    ["name", "template"],
    name={"const": "node"},  # the trainer puts the TrainJob's `trainer` into this one
    replicas=COUNT,
    template=of(["spec"], metadata=of(labels=LABELS | {"properties": ANCESTOR}), spec=JOB_SPEC),
)
RUNTIME = manifest(
    "trainer.kubeflow.org/v1alpha1",
    "TrainingRuntime",
    of(
        mlPolicy=of(numNodes=MORE, torch=of(numProcPerNode={"anyOf": [MORE, among("auto", "cpu", "gpu")]})),
        template=of(["spec"], spec=of(failurePolicy=of(maxRestarts=COUNT), replicatedJobs=some(REPLICATED))),
    ),
)
TRAIN_JOB = manifest(
    "trainer.kubeflow.org/v1alpha1",
    "TrainJob",
    of(
        ["runtimeRef"],
        runtimeRef=of(
            ["name"],
            name=NAME,
            apiGroup={"const": "trainer.kubeflow.org"},
            kind=among("TrainingRuntime", "ClusterTrainingRuntime"),
        ),
        trainer=of(
            image=TEXT | {"maxLength": 500},
            command={"type": "array", "items": {"type": "string", "maxLength": 65536}, "maxItems": 128},
            numNodes=MORE,
            numProcPerNode=MORE,
            resourcesPerNode=RESOURCES,
        ),
    ),
)

SCHEMAS = {made["properties"]["kind"]["const"]: made for made in (SERVICE, JOB, PYTORCH_JOB, RUNTIME, TRAIN_JOB)}
