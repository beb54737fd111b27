"""Checks of the cluster that a run is for, with kubectl's rights, before the run is asked for."""

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from adfm.errors import AdfmError
from adfm.kubeflow import resources
from adfm.kubeflow.cluster import GROUP, PLURAL, RUNTIME, VERSION
from pipelines import checks

_SECRET, _KEY = "adfm-mlflow", "uri"
_TIMEOUT = 5  # seconds
_MANY_IMAGES = 50  # kubelet's nodeStatusMaxImages: a node's status lists no more
_UNKNOWN: Any = object()
_FORBIDDEN: Any = object()


class _Pod(NamedTuple):
    """A pod that a run will ask for."""

    task: str
    requests: dict[str, str]
    selector: dict[str, str]
    tolerations: list[dict[str, Any]]
    copies: int = 1


def check(
    namespace: str, service_account: str, ir: dict[str, Any], platform: dict[str, Any], arguments: dict[str, Any]
) -> list[str]:
    """Refuse a run whose pods would fail or wait for what the cluster lacks, as far as it lets us look.

    The cluster is the one that this pod is in, or that `kubectl` would talk to, if it is the one of the runs: it has
    their service account. Without such a cluster, or where it does not answer or forbids the look, nothing is refused:
    the run's first task checks again. Where it is not known to be theirs, its nodes are looked at all the same, and
    warnings say so.

    Args:
        namespace: Of the runs.
        service_account: Of their pods.
        ir: The compiled pipeline.
        platform: Its settings for Kubernetes, the second document of a compiled file; may be empty.
        arguments: Of the pipeline, by name; with `num_nodes`, training is a TrainJob.

    Returns:
        Warnings.

    Raises:
        AdfmError: MLflow's secret, or what a TrainJob needs, is missing; all that is missing is listed.
    """
    from kubernetes import client

    settings = _settings()
    if settings is None:
        return []
    with client.ApiClient(settings) as connection:
        core = client.CoreV1Api(connection)
        account = _read(core.read_namespaced_service_account, service_account, namespace)
        if account is _UNKNOWN:
            return []
        doubt = []
        if account is None:
            doubt = [
                f"{settings.host}, which kubectl talks to, has no service account {service_account} in the namespace "
                f"{namespace}, and is taken for another cluster. If runs go there: kubectl apply -k deploy/runs."
            ]
        elif account is not _FORBIDDEN:
            problems = _secret_problems(core, namespace)
            if arguments.get("num_nodes"):
                problems += _claim_problems(core, namespace) + _trainer_problems(connection)
            if problems:
                raise AdfmError("\n  ".join([f"{settings.host}, which kubectl talks to, cannot run this:", *problems]))
            return _node_warnings(core, ir, platform, arguments)
        place = f"if runs go to {settings.host}, which kubectl talks to: "
        return doubt + [place + warning for warning in _node_warnings(core, ir, platform, arguments)]


def _node_warnings(core: Any, ir: dict[str, Any], platform: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    """Images and resources that no node has, where nodes may be listed."""
    answer = _read(core.list_node)
    nodes = [] if answer is None or _unknown(answer) else answer.items
    if not nodes:
        return []
    local = checks.local_images(checks.images(ir))
    return _image_warnings(local, nodes) + _room_warnings(_pods(ir, platform, arguments), nodes)


def _settings() -> Any:
    """How to reach the cluster; None without one."""
    import yaml
    from kubernetes import client, config

    settings = client.Configuration()
    settings.retries = False
    for load in (config.load_incluster_config, config.load_kube_config):
        try:
            load(client_configuration=settings)
            return settings
        except (config.ConfigException, OSError, yaml.YAMLError, AttributeError, LookupError, TypeError):
            continue  # the last three: a configuration of another shape, which the client does not check
    return None


def _read(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the cluster has; None if it lacks it, `_FORBIDDEN` if it forbids the look, `_UNKNOWN` without an answer."""
    import urllib3
    from kubernetes.client.exceptions import ApiException

    try:
        return call(*args, _request_timeout=_TIMEOUT, **options)
    except ApiException as error:
        return {404: None, 401: _FORBIDDEN, 403: _FORBIDDEN}.get(error.status, _UNKNOWN)
    except (urllib3.exceptions.HTTPError, ValueError):  # ValueError: an answer that is not of the API
        return _UNKNOWN


def _unknown(answer: Any) -> bool:
    return answer is _UNKNOWN or answer is _FORBIDDEN


def _secret_problems(core: Any, namespace: str) -> list[str]:
    secret = _read(core.read_namespaced_secret, _SECRET, namespace)
    if _unknown(secret) or (secret and (secret.data or {}).get(_KEY)):
        return []
    return [
        f"the namespace {namespace} has no secret {_SECRET} with the key {_KEY}, MLflow's address; make it "
        "(deploy/runs/secrets.example.yaml). If runs go to another cluster, let kubectl's context be that one."
    ]


def _claim_problems(core: Any, namespace: str) -> list[str]:
    name = resources.WORKSPACE_CLAIM
    claim = _read(core.read_namespaced_persistent_volume_claim, name, namespace)
    if _unknown(claim):
        return []
    if claim is None:
        return [
            f"the namespace {namespace} has no volume claim {name}, on which several machines train; make it "
            "(deploy/runs/workspace.yaml)."
        ]
    modes = (claim.spec and claim.spec.access_modes) or []
    if "ReadWriteMany" not in modes:
        return [
            f"the volume claim {name} in the namespace {namespace} is {', '.join(modes) or 'without access mode'}; the "
            "machines need ReadWriteMany: make it again with a storage class that has it (deploy/runs/workspace.yaml)."
        ]
    if claim.status and claim.status.phase == "Lost":
        return [f"the volume of the claim {name} in the namespace {namespace} is gone (phase Lost); make both again."]
    return []


def _trainer_problems(connection: Any) -> list[str]:
    """What is wrong with Kubeflow Trainer: it is missing, older than 2.2, or lacks the runtime."""
    from kubernetes import client

    objects = client.CustomObjectsApi(connection)
    fields = _trainjob_fields(connection, objects)
    if fields is None:
        return ["there is no Kubeflow Trainer (TrainJob); --num-nodes needs 2.2 or newer: install it."]
    if not fields:
        return [f"Kubeflow Trainer does not serve {GROUP}/{VERSION}, as 2.2 and 2.3 do; install one of these."]
    if not _unknown(fields) and "runtimePatches" not in fields:
        return ["Kubeflow Trainer is older than 2.2: its TrainJob has no runtimePatches; upgrade it."]
    if _read(objects.get_cluster_custom_object, GROUP, VERSION, "clustertrainingruntimes", RUNTIME) is None:
        return [
            f"Kubeflow Trainer has no ClusterTrainingRuntime {RUNTIME}; install its runtimes "
            "(manifests/overlays/runtimes of the Trainer's release)."
        ]
    return []


def _trainjob_fields(connection: Any, objects: Any) -> Any:
    """Names of the fields of a TrainJob's spec; None without Kubeflow Trainer.

    The CustomResourceDefinition has them. Where it may not be read, the API's own description, which every account
    may read (the cluster role `system:discovery`), has them as well.
    """
    group = "apiextensions.k8s.io"
    definition = _read(objects.get_cluster_custom_object, group, "v1", "customresourcedefinitions", f"{PLURAL}.{GROUP}")
    if not _unknown(definition):
        return definition and _fields(
            version.get("schema", {}).get("openAPIV3Schema", {})
            for version in definition.get("spec", {}).get("versions", [])
            if version.get("name") == VERSION and version.get("served", True)
        )
    description = _read(
        connection.call_api,
        f"/openapi/v3/apis/{GROUP}/{VERSION}",
        "GET",
        auth_settings=["BearerToken"],
        response_type="object",
        _return_http_data_only=True,
    )
    if description is None or _unknown(description):
        return description
    schemas = description.get("components", {}).get("schemas", {})
    return _fields(schema for name, schema in schemas.items() if name.split(".")[-1] == "TrainJob")


def _fields(schemas: Iterable[dict[str, Any]]) -> set[str]:
    return {field for each in schemas for field in each.get("properties", {}).get("spec", {}).get("properties", {})}


def _image_warnings(local: Sequence[str], nodes: Sequence[Any]) -> list[str]:
    """Images that cannot be pulled and that no node has; nothing if the nodes do not list all that they have.

    A node's list may be a minute old, so that an image that was just loaded is not in it.
    """
    there: set[str] = set()
    for node in nodes:
        images = (node.status and node.status.images) or []
        if not 0 < len(images) < _MANY_IMAGES:
            return []
        there |= {name for image in images for name in image.names or []}
    return [
        f"no node has the image {name}, and none can pull it: its pods will wait for ever. Push it and name it in "
        "ADFM_CPU_IMAGE or ADFM_GPU_IMAGE, or load it into the nodes (`kind load docker-image`)."
        for name in local
        if name not in there
    ]


def _pods(ir: dict[str, Any], platform: dict[str, Any], arguments: dict[str, Any]) -> list[_Pod]:
    """The pods of the tasks, and of a TrainJob's machines, with the arguments of the run in them."""
    defaults = {
        name: definition.get("defaultValue")
        for name, definition in ir["root"].get("inputDefinitions", {}).get("parameters", {}).items()
    }
    values = defaults | arguments

    def value(text: Any) -> Any:
        """The constant, or the argument that a placeholder, or the name of a task's input, stands for."""
        name = re.fullmatch(r"(?:\{\{\$\.inputs\.parameters\[')?pipelinechannel--(\w+)(?:'\]\}\})?", str(text))
        return values.get(name[1]) if name else text

    kubernetes = platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    tasks = []
    for label, executor in ir["deploymentSpec"]["executors"].items():
        requests = executor.get("container", {}).get("resources", {})
        settings = kubernetes.get(label, {})
        selector = settings.get("nodeSelector", {})
        gpu = requests.get("accelerator", {})
        requests = {
            "cpu": value(requests.get("resourceCpuRequest")),
            "memory": value(requests.get("resourceMemoryRequest")),
            str(value(gpu.get("resourceType"))): value(gpu.get("resourceCount")),
        }
        tolerations: list[Any] = []
        for each in settings.get("tolerations", []):
            given = value(each["tolerationJson"].get("componentInputParameter")) if "tolerationJson" in each else each
            tolerations += given if isinstance(given, list) else [given or {}]
        labels = value(selector.get("nodeSelectorJson", {}).get("componentInputParameter"))
        tasks.append(
            _Pod(
                label.removeprefix("exec-"),
                {name: str(amount) for name, amount in requests.items() if amount not in (None, "", 0, "0")},
                dict(labels if isinstance(labels, dict) else selector.get("labels") or {}),
                tolerations,
            )
        )
    if arguments.get("num_nodes"):
        needs = resources.NEEDS["train"]
        gpus = {values["gpu_type"]: str(values["num_gpus"])} if values.get("num_gpus") else {}
        tasks.append(
            _Pod(
                "train on a machine",
                {"cpu": needs.cpu, "memory": needs.memory, **gpus},
                values.get("node_selector") or {},
                values.get("tolerations") or [],
                int(arguments["num_nodes"]),
            )
        )
    return tasks


def _room_warnings(tasks: Sequence[_Pod], nodes: Sequence[Any]) -> list[str]:
    """Pods that no node has room for, be it empty. An autoscaler may add one, so that nothing is refused."""
    alike: dict[str, list[str]] = {}
    for pod in tasks:
        if (reason := _no_room(pod, nodes)) is not None:
            alike.setdefault(reason, []).append(pod.task)
    return [
        f"{', '.join(names)}: {reason}; unless a node is added, the run waits there." for reason, names in alike.items()
    ]


def _no_room(pod: _Pod, nodes: Sequence[Any]) -> str | None:
    from kubernetes.utils.quantity import parse_quantity

    amounts = {name: parse_quantity(amount) for name, amount in pod.requests.items()}
    demand = ", ".join(f"{name} {amount}" for name, amount in pod.requests.items())
    labels = "".join(f", {key}={value}" for key, value in pod.selector.items())
    fitting = [node for node in nodes if _takes(node, pod)]
    if not fitting:
        return f"no node is open to its pod{f' (labels{labels[1:]})' if labels else ''}, which asks for {demand}"
    rooms = [{name: _allocatable(node, name) for name in amounts} for node in fitting]
    fits = sum(
        min((int(room[name] // amount) for name, amount in amounts.items()), default=pod.copies) for room in rooms
    )
    if fits >= pod.copies:
        return None
    if fits:
        return f"the nodes have room for {fits} of {pod.copies} pods that ask for {demand}"
    most = ", ".join(f"{name} {_rounded(max(room[name] for room in rooms), name)}" for name in amounts)
    return f"no node has {demand}{labels}; the most that one has is {most}"


def _allocatable(node: Any, resource: str) -> Decimal:
    from kubernetes.utils.quantity import parse_quantity

    have = (node.status and node.status.allocatable) or {}
    return Decimal(parse_quantity(have.get(resource, 0)))


def _rounded(amount: Decimal, resource: str) -> str:
    return f"{amount / 2**30:.1f}Gi" if resource == "memory" else f"{amount.normalize():f}"


def _takes(node: Any, pod: _Pod) -> bool:
    """Whether the scheduler may put the pod on the node: not cordoned, its labels match, its taints are tolerated."""
    labels = (node.metadata and node.metadata.labels) or {}
    spec = node.spec
    if (spec and spec.unschedulable) or any(labels.get(key) != value for key, value in pod.selector.items()):
        return False
    taints = [taint for taint in (spec and spec.taints) or [] if taint.effect != "PreferNoSchedule"]
    return all(any(_tolerates(each, taint) for each in pod.tolerations) for taint in taints)


def _tolerates(toleration: dict[str, Any], taint: Any) -> bool:
    """As Kubernetes matches them: an empty key with `Exists` is every taint, an empty effect every effect."""
    exists = toleration.get("operator") == "Exists"
    key, effect = toleration.get("key"), toleration.get("effect")
    return (
        (key == taint.key or (exists and not key))
        and (exists or (toleration.get("value") or "") == (taint.value or ""))
        and (not effect or effect == taint.effect)
    )
