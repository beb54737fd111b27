"""Checks of a submission that need no server: names, the schedule, whether the images can be pulled."""

import ipaddress
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from adfm.errors import AdfmError

_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_NAME = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_REFERENCE = (  # github.com/distribution/reference, the digest's length aside
    r"(?:(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[-A-Za-z0-9.]*[A-Za-z0-9])?)(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?(?:@[A-Za-z][-A-Za-z0-9_+.]*:[0-9A-Fa-f]+)?"
)
_WORDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_EVERY = r"@every (?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:h|m|s|ms|us|µs|ns))+"  # a duration as Go writes it
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CRON: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("seconds", 0, 59, ()),
    ("minutes", 0, 59, ()),
    ("hours", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)
"""The fields of KFP's cron: name, least, most, words."""

_EXPERIMENT = 128  # bytes: `Experiment.Name` in KFP's backend/src/apiserver/validation/length.go


def require_names(experiment: str, namespace: str | None, service_account: str | None, schedule: str | None) -> None:
    """Check names that the server or the cluster would refuse later, with half of the submission done.

    Names in the settings, as `mlflow.registered_model`, are checked by `adfm.params`.

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
    if schedule is not None and (problem := _cron_problem(schedule)):
        problems.append(f"--schedule {schedule!r} {problem}")
    if problems:
        raise AdfmError("\n  ".join(problems))


def _cron_problem(schedule: str) -> str:
    """Why robfig/cron 1.2, by which KFP reads schedules once all else is created, would refuse one; "" if not."""
    if schedule.startswith("@"):
        if schedule in _WORDS or re.fullmatch(_EVERY, schedule):
            return ""
        return f"should be one of {', '.join(_WORDS)}, or @every with a duration, as in '@every 12h'"
    fields = schedule.split()
    if len(fields) != len(_CRON):
        return "should have six fields, seconds first, as in '0 0 3 * * *' for three o'clock"
    chosen = []
    for field, (name, least, most, words) in zip(fields, _CRON, strict=True):
        values = [_cron_values(part, least, most, words) for part in field.split(",")]
        if not all(values):
            return f"has {field!r} for {name} ({least} to {most}); the first field is seconds"
        chosen.append(set().union(*values))
    *_, days, months, _ = chosen
    # KFP's controller would search for ever for a day that never comes (`getNextScheduledEpochImp` in
    # backend/src/crd/controller/scheduledworkflow/util/cron_schedule.go).
    if fields[5][0] in "*?" and min(days) > max(29 if m == 2 else 30 if m in (4, 6, 9, 11) else 31 for m in months):
        return "names a day that its months do not have"
    return ""


def _cron_values(part: str, least: int, most: int, words: Sequence[str]) -> set[int]:
    """The values of a part of a field, `*`, `?`, N or N-M, each with /STEP; empty if it is wrong."""
    match = re.fullmatch(r"(?:[*?]|(\w+)(?:-(\w+))?)(?:/([0-9]+))?", part, re.ASCII)
    if not match:
        return set()
    low, high, step = match.groups()
    ends = [
        least + words.index(end.lower()) if end.lower() in words else int(end) if end.isdecimal() else -1
        for end in (low, high)
        if end
    ]
    first = ends[0] if ends else least
    last = ends[1] if high else first if ends and not step else most
    if not least <= first <= last <= most or (step and not int(step)):
        return set()
    return set(range(first, last + 1, int(step or 1)))


def address(option: str, text: str) -> str:
    """The address of a server without a slash at its end.

    Raises:
        AdfmError: It is not an http(s):// address; the message names the option.
    """
    text = text.strip()
    try:
        parts = urlsplit(text)
        right = (
            parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"[\s?#]", text)
        )
    except ValueError:  # brackets that hold no IPv6 address, a port that is not a number
        right = False
    if not right:
        what = "the KFP API" if option == "--host" else "KFP's pages"
        raise AdfmError(f"{option} {text}: name {what} by an http(s):// address, without what follows ? or #.")
    return text.rstrip("/")


def require_labels(arguments: dict[str, Any]) -> None:
    """Check a node selector and tolerations, which Kubernetes would refuse once the pods with GPUs are created.

    Args:
        arguments: Of the pipeline; `node_selector` and `tolerations` are optional.

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


def require_references(names: Sequence[str]) -> None:
    """Check the names of images: the pods of an impossible one would wait for ever (`InvalidImageName`).

    Raises:
        AdfmError: All names that are wrong.
    """
    wrong = [name for name in names if not re.fullmatch(_REFERENCE, name)]
    if wrong:
        raise AdfmError(
            f"{', '.join(map(repr, wrong))} cannot be the name of an image: set ADFM_CPU_IMAGE and ADFM_GPU_IMAGE, "
            "as in registry.example.com/adfm:1.0."
        )


def local_images(names: Sequence[str]) -> list[str]:
    """The images that are on the machine itself, by their names: `localhost/adfm:cpu`."""
    return [name for name in names if "/" in name and _is_loopback(_host_of(f"//{name}"))]


def require_pullable(names: Sequence[str], host: str) -> list[str]:
    """Check that a server on another machine is not given images of this one, for which its pods would wait for ever.

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
