"""Checks of a submission that need no server: names, the schedule, whether the images can be pulled."""

import ipaddress
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from adfm.errors import AdfmError

_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_NAME = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_EXPERIMENT = 128  # bytes: `Experiment.Name` in KFP's backend/src/apiserver/validation/length.go


def require_names(experiment: str, namespace: str | None, service_account: str | None, schedule: str | None) -> None:
    """Refuse names that the server or the cluster would refuse later, with half of the submission done.

    Names in the settings, as `register.model`, are checked by `adfm.params`.

    Args:
        experiment: Name of KFP's experiment.
        namespace: Of the runs, if it was given: a DNS label (RFC 1123), as Kubernetes wants it.
        service_account: Of the pods, if it was given: a DNS subdomain (RFC 1123).
        schedule: KFP's cron expression, if it was given: six fields, or a word as `@daily`. Five, as crontab has them,
            are read by KFP with seconds first, so that `0 3 * * *` would run each hour (robfig/cron, v1.2).

    Raises:
        AdfmError: Everything that is wrong, a line each.
    """
    problems = []
    if not (
        0 < len(experiment.encode()) <= _EXPERIMENT and experiment.isprintable() and experiment == experiment.strip()
    ):
        problems.append(
            f"--experiment {experiment!r} should be 1 to {_EXPERIMENT} printable characters, without blanks at its ends"
        )
    if namespace is not None and not re.fullmatch(_LABEL, namespace):
        problems.append(
            f"--namespace {namespace!r} should be 1 to 63 of a to z, digits and hyphens, no hyphen at its ends"
        )
    if service_account is not None and not _is_subdomain(service_account):
        problems.append(
            f"--service-account {service_account!r} should be of a to z, digits, hyphens and dots, "
            "with a letter or digit first and last"
        )
    if schedule is not None and not schedule.startswith("@") and len(schedule.split()) != 6:
        problems.append(
            f"--schedule {schedule!r} should have six fields, seconds first, as in '0 0 3 * * *' for three o'clock"
        )
    if problems:
        raise AdfmError("\n  ".join(problems))


def require_labels(arguments: dict[str, Any]) -> None:
    """Refuse a node selector and tolerations that Kubernetes would refuse once the pods with GPUs are made.

    Args:
        arguments: Of the pipeline; `node_selector` and `tolerations` are looked at, if they are there.

    Raises:
        AdfmError: Keys or values that are not those of a label, all of them.
    """
    pairs = [("--node-selector", *pair) for pair in arguments.get("node_selector", {}).items()]
    pairs += [("--toleration", each["key"], each.get("value") or "") for each in arguments.get("tolerations", [])]
    problems = []
    for option, key, value in pairs:
        prefix, slash, name = key.rpartition("/")
        if not re.fullmatch(_NAME, name) or (slash and not _is_subdomain(prefix)):
            problems.append(f"{option}: {key!r} is not the key of a label of Kubernetes, as in nvidia.com/gpu")
        if value and not re.fullmatch(_NAME, value):
            problems.append(f"{option} {key}: {value!r} is not the value of a label of Kubernetes, as in a100")
    if problems:
        raise AdfmError("\n  ".join(problems))


def images(ir: dict[str, Any]) -> list[str]:
    """The images of a compiled pipeline's tasks, each once, by name."""
    executors = ir["deploymentSpec"]["executors"].values()
    return sorted({executor["container"]["image"] for executor in executors if "container" in executor})


def local_images(names: Sequence[str]) -> list[str]:
    """Those images whose name says that they are on the machine that uses them: `localhost/adfm:cpu`."""
    return [name for name in names if "/" in name and _is_loopback(_host_of(f"//{name}"))]


def require_pullable(names: Sequence[str], host: str) -> list[str]:
    """Refuse images of this machine for a server on another one: its pods would wait for them for ever.

    A server at a loopback address may be a cluster on this machine (kind, minikube), into whose nodes images are
    loaded, as well as a remote one behind `kubectl port-forward`: that is a warning.

    Args:
        names: The images.
        host: Address of the KFP API.

    Returns:
        Warnings.

    Raises:
        AdfmError: Images of this machine, and a server elsewhere.
    """
    local = ", ".join(local_images(names))
    if not local:
        return []
    remedy = "push them, and name them in ADFM_CPU_IMAGE and ADFM_GPU_IMAGE"
    if not _is_loopback(_host_of(host)):
        raise AdfmError(
            f"the nodes behind {host} cannot pull {local}; {remedy} (docs/kubernetes.md). Of a cluster on this machine "
            "whose nodes have them, use the address that kubectl port-forward gives."
        )
    return [f"{local} can run only where the nodes have them already, as after `kind load`; otherwise {remedy}."]


def _is_subdomain(text: str) -> bool:
    return len(text) <= 253 and bool(re.fullmatch(rf"{_LABEL}(?:\.{_LABEL})*", text))


def _host_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # brackets that hold no IPv6 address
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
