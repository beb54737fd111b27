"""Checks of the cluster that a run is for, with kubectl's rights, before the run is submitted."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple

from adfm.errors import AdfmError
from adfm.kubeflow.cluster import GROUP, PLURAL, RUNTIME, VERSION, claim_problem
from adfm.kubeflow.resources import MACHINE, RESOURCES, WORKSPACE_CLAIM
from pipelines import checks

_SECRET, _KEY = "adfm-mlflow", "uri"
_TIMEOUT = 5  # seconds
_MANY_IMAGES = 50  # kubelet's nodeStatusMaxImages: a node's status lists no more


class _Unreadable(Exception):
    """The cluster does not answer, or not as the Kubernetes API does."""


class _Forbidden(_Unreadable):
    """The account may not read it."""


class _Pod(NamedTuple):
    """A pod that a run will ask for."""

    task: str
    requests: dict[str, str]
    selector: dict[str, str]
    tolerations: list[dict[str, Any]]
    copies: int = 1


def check(namespace: str, service_account: str, ir: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    """Refuse a run whose pods would fail or wait for something that the cluster lacks, as far as it may be read.

    The cluster is the one that this pod is in, or that `kubectl` would talk to, if it has the service account of the
    runs. Without such a cluster, or where it does not answer or may not be read, nothing is refused: the run's first
    task checks again. Where it is not known whether the runs go there, its nodes are checked all the same, and the
    warnings say so.

    Args:
        namespace: Of the runs.
        service_account: Of their pods.
        ir: The compiled pipeline.
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
        place = f"{settings.host}, which kubectl talks to"
        doubt = []
        try:
            if _read(core.read_namespaced_service_account, service_account, namespace):
                _require(connection, namespace, place, several_machines=bool(arguments.get("num_nodes")))
                return _node_warnings(core, ir, arguments)
            doubt = [
                f"{place}, has no service account {service_account} in the namespace {namespace}, and is taken for "
                "another cluster. If runs go there: kubectl apply -k deploy/runs."
            ]
        except _Forbidden:
            pass  # it is not known whether runs go there
        except _Unreadable:
            return []
        return doubt + [f"if runs go to {place}: {text}" for text in _node_warnings(core, ir, arguments)]


def _require(connection: Any, namespace: str, place: str, several_machines: bool) -> None:
    from kubernetes import client

    core, objects = client.CoreV1Api(connection), client.CustomObjectsApi(connection)
    problems = _problems(_secret_problem, core, namespace)
    if several_machines:
        problems += _problems(_claim_problem, core, namespace)
        problems += _problems(_version_problem, connection, objects) or _problems(_runtime_problem, objects)
    if problems:
        raise AdfmError("\n  ".join([f"{place}, cannot run this:", *problems]))


def _problems(check: Callable[..., str], *args: Any) -> list[str]:
    """What a check finds wrong; nothing where it cannot read what it checks."""
    with suppress(_Unreadable):
        if problem := check(*args):
            return [problem]
    return []


def _node_warnings(core: Any, ir: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    """Images and resources that no node has, where nodes may be listed."""
    try:
        nodes = (answer := _read(core.list_node)) and answer.items
    except _Unreadable:
        return []
    if not nodes:
        return []
    local = checks.local_images(checks.images(ir))
    return _image_warnings(local, nodes) + _room_warnings(_pods(ir, arguments), nodes)


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
    """What the cluster has; None if it does not exist.

    Raises:
        _Forbidden: The account may not read it.
        _Unreadable: There is no answer, or it is not of the API.
    """
    import urllib3
    from kubernetes.client.exceptions import ApiException

    try:
        return call(*args, _request_timeout=_TIMEOUT, **options)
    except ApiException as error:
        if error.status == 404:
            return None
        raise (_Forbidden if error.status in (401, 403) else _Unreadable) from error
    except (urllib3.exceptions.HTTPError, ValueError) as error:  # ValueError: an answer that is not of the API
        raise _Unreadable from error


def _secret_problem(core: Any, namespace: str) -> str:
    secret = _read(core.read_namespaced_secret, _SECRET, namespace)
    if secret and (secret.data or {}).get(_KEY):
        return ""
    return (
        f"the namespace {namespace} has no secret {_SECRET} with the key {_KEY}, MLflow's address; make it "
        "(deploy/runs/secrets.example.yaml). If runs go to another cluster, let kubectl's context be that one."
    )


def _claim_problem(core: Any, namespace: str) -> str:
    name = WORKSPACE_CLAIM
    return claim_problem(_read(core.read_namespaced_persistent_volume_claim, name, namespace), name, namespace)


def _version_problem(connection: Any, objects: Any) -> str:
    fields = _trainjob_fields(connection, objects)
    if fields is None:
        return "there is no Kubeflow Trainer (TrainJob); --num-nodes needs 2.2 or newer: install it."
    if not fields:
        return f"Kubeflow Trainer does not serve {GROUP}/{VERSION}, as 2.2 and 2.3 do; install one of these."
    if "runtimePatches" not in fields:
        return "Kubeflow Trainer is older than 2.2: its TrainJob has no runtimePatches; upgrade it."
    return ""


def _runtime_problem(objects: Any) -> str:
    if _read(objects.get_cluster_custom_object, GROUP, VERSION, "clustertrainingruntimes", RUNTIME) is not None:
        return ""
    return (
        f"Kubeflow Trainer has no ClusterTrainingRuntime {RUNTIME}; install its runtimes "
        "(manifests/overlays/runtimes of the Trainer's release)."
    )


def _trainjob_fields(connection: Any, objects: Any) -> set[str] | None:
    """Names of the fields of a TrainJob's spec; None without Kubeflow Trainer.

    The CustomResourceDefinition has them. Where it may not be read, the API's own description, which every account
    may read (the cluster role `system:discovery`), has them as well.
    """
    group = "apiextensions.k8s.io"
    with suppress(_Unreadable):
        definition = _read(
            objects.get_cluster_custom_object, group, "v1", "customresourcedefinitions", f"{PLURAL}.{GROUP}"
        )
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
    if description is None:
        return None
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


def _pods(ir: dict[str, Any], arguments: dict[str, Any]) -> list[_Pod]:
    """The pods of the tasks, and of a TrainJob's machines, as `RESOURCES` and the run's arguments make them."""
    number = arguments.get("num_gpus")
    gpus = {arguments["gpu_type"]: str(number)} if number else {}
    selector, tolerations = arguments.get("node_selector") or {}, arguments.get("tolerations") or []

    def pod(name: str, task: str, copies: int = 1) -> _Pod:
        entry = RESOURCES[task]
        requests = {"cpu": entry.cpu, "memory": entry.memory}
        if entry.gpu:
            return _Pod(name, requests | gpus, selector, tolerations, copies)
        return _Pod(name, requests, {}, [], copies)

    tasks = [label.removeprefix("exec-") for label in ir["deploymentSpec"]["executors"]]
    machines = [pod("train on a machine", MACHINE, nodes)] if (nodes := arguments.get("num_nodes")) else []
    return [pod(task, task) for task in tasks if task in RESOURCES] + machines


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
