"""The manifests for a cluster, as kustomize builds them, against the schemas of Kubernetes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
VERSION = "1.33.0"


def built(folder: str) -> list[dict[str, Any]]:
    if not shutil.which("kubectl"):
        pytest.skip("NOT TESTED: there is no kubectl")
    command = ["kubectl", "kustomize", str(DEPLOY / folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [each for each in yaml.safe_load_all(text) if each]


def containers(folder: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every container with the pod that it is in."""
    pods = [each["spec"]["template"]["spec"] for each in built(folder) if "template" in each.get("spec", {})]
    return [(pod, each) for pod in pods for each in (*pod.get("initContainers", ()), *pod["containers"])]


@pytest.mark.parametrize("folder", ["server", "runs"])
def test_every_manifest_fits_its_schema(folder: str) -> None:
    manifests = built(folder)
    assert manifests
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


@pytest.mark.parametrize(
    "file", ["secrets.example.yaml", "keys.example.yaml", "runs/workspace.yaml", "runs/workspace-owner.yaml"]
)
def test_what_is_applied_by_hand_fits_its_schema(file: str) -> None:
    for manifest in yaml.safe_load_all((DEPLOY / file).read_text()):
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_no_container_is_privileged_or_unbounded() -> None:
    for pod, container in containers("server"):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} <= set(container["resources"])


def test_every_key_of_a_secret_that_is_needed_is_in_the_example() -> None:
    secrets = list(yaml.safe_load_all((DEPLOY / "secrets.example.yaml").read_text()))
    shown = {(each["metadata"]["name"], key) for each in secrets for key in each["stringData"]}
    used = {
        (variable["valueFrom"]["secretKeyRef"]["name"], variable["valueFrom"]["secretKeyRef"]["key"])
        for _, container in containers("server")
        for variable in container["env"]
        if "valueFrom" in variable
    }
    from adfm.pods import SECRETS

    used |= {(secret, key) for secret, keys in SECRETS.items() for key in keys}
    assert used <= shown


def test_the_account_of_the_runs_may_read_no_secret_but_that_of_the_artifacts() -> None:
    (role,) = [each for each in built("runs") if each["kind"] == "Role"]
    rules = [rule for rule in role["rules"] if "secrets" in rule["resources"]]
    assert [(rule["resourceNames"], rule["verbs"]) for rule in rules] == [(["mlpipeline-minio-artifact"], ["get"])]
    assert not any("*" in rule["verbs"] or "*" in rule["resources"] for rule in role["rules"])
