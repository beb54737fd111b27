"""The manifests for a cluster, as kustomize builds them, against the schemas of Kubernetes."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from adfm.kubeflow import resources
from adfm.process import environment

DEPLOY = Path(__file__).parents[2] / "deploy"
VERSIONS = ("1.29.0", "1.35.0")  # the oldest that docs/kubernetes.md names, and the newest that was tried
FOLDERS = ["server", "server/upgrade", "server/restore", "runs"]
SERVER = FOLDERS[:3]
BY_HAND = [
    *("keys.example.yaml", "runs/secrets.example.yaml", "server/secrets.example.yaml"),
    *("runs/workspace.yaml", "runs/workspace-owner.yaml"),
]

Manifest = dict[str, Any]


@cache
def built(folder: Path) -> list[Manifest]:
    if not shutil.which("kubectl"):
        pytest.skip("NOT TESTED: there is no kubectl")
    command = ["kubectl", "kustomize", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [each for each in yaml.safe_load_all(text) if each]


def loaded(file: str) -> list[Manifest]:
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


def fits_schema(manifest: Manifest) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def pod_of(manifest: Manifest) -> Manifest | None:
    """The pod that a workload makes."""
    spec = manifest.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return spec.get("template", {}).get("spec")


def containers() -> list[tuple[str, Manifest, Manifest]]:
    """Every container of deploy/server with its workload's kind and the pod that it is in."""
    found = []
    for manifest in (each for folder in SERVER for each in built(DEPLOY / folder)):
        if pod := pod_of(manifest):
            found += [(manifest["kind"], pod, each) for each in (*pod.get("initContainers", ()), *pod["containers"])]
    assert {kind for kind, _, _ in found} == {"CronJob", "Deployment", "Job", "StatefulSet"}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_manifest_fits_its_schema(folder: str) -> None:
    manifests = built(DEPLOY / folder)
    assert manifests
    for manifest in manifests:
        fits_schema(manifest)


@pytest.mark.parametrize("file", BY_HAND)
def test_what_is_applied_by_hand_fits_its_schema_and_goes_where_the_command_line_says(file: str) -> None:
    for manifest in loaded(file):
        fits_schema(manifest)
        assert "namespace" not in manifest["metadata"]


def test_no_container_is_privileged_or_unbounded() -> None:
    for _, pod, container in containers():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        resources = container["resources"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["requests"]), container["name"]
        assert {"memory", "ephemeral-storage"} <= set(resources["limits"]), container["name"]


def test_secrets_that_are_files_can_be_read_by_the_user_of_the_container() -> None:
    """They are root's; only a pod's `fsGroup` gives them to another group."""
    volumes = [(pod, each) for _, pod, _ in containers() for each in pod.get("volumes", ())]
    secrets = [(pod, each["secret"]) for pod, each in volumes if "secret" in each]
    assert [secret["secretName"] for _, secret in secrets] == ["adfm-signing"]
    for pod, secret in secrets:
        assert secret["defaultMode"] == 0o440  # a private key is not for all
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_images_of_a_registry_with_a_login_are_pulled_with_the_secret_of_the_runs() -> None:
    for _, pod, container in containers():
        assert pod["imagePullSecrets"] == [{"name": resources.PULL_SECRET}], container["name"]


def test_what_runs_for_ever_has_probes_that_are_patient() -> None:
    """A server that migrates, recovers or works on a large file for minutes is not killed."""
    served = [each for kind, pod, each in containers() if kind not in ("Job", "CronJob") and each in pod["containers"]]
    assert {each["name"] for each in served} == {"approvals", "mlflow", "postgres"}
    for container in served:
        start, live = container["startupProbe"], container["livenessProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 300
        assert live["periodSeconds"] * live["failureThreshold"] >= 180
        assert min(start.get("timeoutSeconds", 1), live.get("timeoutSeconds", 1)) >= 5
        assert "readinessProbe" in container or container["name"] == "approvals"  # it listens on no port


def test_a_drain_is_never_held_up_and_no_workload_is_without_a_budget() -> None:
    manifests = built(DEPLOY / "server")
    budgets = [each["spec"] for each in manifests if each["kind"] == "PodDisruptionBudget"]
    assert all(each["maxUnavailable"] == 1 and "minAvailable" not in each for each in budgets)
    selectors = [each["selector"]["matchLabels"] for each in budgets]
    workloads = [each for each in manifests if each["kind"] in ("Deployment", "StatefulSet")]
    assert [each["spec"]["replicas"] for each in workloads] == [1, 1, 1]
    for each in workloads:
        assert each["spec"]["template"]["metadata"]["labels"] in selectors


def test_every_container_that_uses_the_database_is_told_where_it_is_in_the_same_way() -> None:
    """And may reach it: the network policy lets its pod in."""
    users = [each for _, _, each in containers() if "envFrom" in each]
    assert {each["name"] for each in users} == {"schema", "mlflow", "backup", "runs", "users", "restore"}
    address = [[each for each in container["env"] if each["name"].startswith("PG")] for container in users]
    assert all(each == address[0] for each in address)
    assert all(each["envFrom"] == users[0]["envFrom"] for each in users)
    keys = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in address[0]}
    defaults = next(each["data"] for each in loaded("server/database.yaml") if each["metadata"]["name"] == "database")
    assert {name for name, key in keys.items() if key.get("optional")} <= set(defaults)
    assert {name for name, key in keys.items() if not key.get("optional")} == {"PGPASSWORD"}

    (policy,) = [
        each["spec"]
        for each in built(DEPLOY / "server")
        if (each["kind"], each["metadata"]["name"]) == ("NetworkPolicy", "postgres")
    ]
    (rule,) = policy["ingress"][0]["from"]
    labels = set()
    for manifest in (each for folder in SERVER for each in built(DEPLOY / folder)):
        pod = pod_of(manifest) or {"containers": []}
        if any("envFrom" in each for each in pod["containers"]):
            spec = manifest["spec"].get("jobTemplate", manifest)["spec"]
            labels.add(spec["template"]["metadata"]["labels"]["app.kubernetes.io/name"])
    assert set(rule["podSelector"]["matchExpressions"][0]["values"]) == labels


def test_the_dump_before_an_upgrade_is_the_nightly_one() -> None:
    backups = [each for _, _, each in containers() if each["name"] == "backup"]
    assert len(backups) == 2
    assert len({tuple(each["command"]) for each in backups}) == 1


def test_the_image_is_named_once_for_all_of_the_server() -> None:
    images = {each["image"] for _, _, each in containers()}
    assert images == {"registry.example.com/adfm:cpu", "docker.io/library/postgres:17"}
    named = [path for path in (DEPLOY / "server").rglob("*.yaml") if "registry.example.com" in path.read_text()]
    assert named == [DEPLOY / "server/image/kustomization.yaml"]


def test_a_managed_postgres_leaves_out_the_one_here_and_nothing_else(tmp_path: Path) -> None:
    here = shutil.copytree(DEPLOY / "server", tmp_path / "server")
    kustomization = here / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text().replace("# - managed-postgres", "- managed-postgres"))

    def names(manifests: list[Manifest]) -> set[tuple[str, str]]:
        return {(each["kind"], each["metadata"]["name"]) for each in manifests}

    left_out = names(built(DEPLOY / "server")) - names(built(here))
    assert left_out == {(each["kind"], each["metadata"]["name"]) for each in loaded("server/postgres.yaml")}
    assert names(built(here)) < names(built(DEPLOY / "server"))


def test_storage_classes_are_a_line_to_fill_in() -> None:
    for file in ("server/postgres.yaml", "server/backup.yaml"):
        text = (DEPLOY / file).read_text()
        assert re.search(r"^ +# storageClassName: ", text, re.MULTILINE), file
        uncommented = text.replace("# storageClassName", "storageClassName")
        for manifest in yaml.safe_load_all(uncommented):
            fits_schema(manifest)
        assert "storageClassName" in str(list(yaml.safe_load_all(uncommented)))


def test_every_key_of_a_secret_that_is_needed_is_in_the_examples() -> None:
    def keys(file: str) -> set[tuple[str, str]]:
        uncommented = re.sub(r"^  # (postgres-\w+:)", r"  \1", (DEPLOY / file).read_text(), flags=re.MULTILINE)
        secrets = list(yaml.safe_load_all(uncommented))
        return {(each["metadata"]["name"], key) for each in secrets for key in each["stringData"]}

    used = {
        (variable["valueFrom"]["secretKeyRef"]["name"], variable["valueFrom"]["secretKeyRef"]["key"])
        for _, _, container in containers()
        for variable in container["env"]
        if "valueFrom" in variable
    }
    assert used | {("adfm-signing", "private.pem")} == keys("server/secrets.example.yaml")
    assert {("adfm-server", f"s3-{key}") for key in resources.SECRETS["adfm-s3"]} <= used
    runs = {(secret, key) for secret, each in resources.SECRETS.items() for key in each}
    assert runs | {(resources.SIGNING, "private.pem")} == keys("runs/secrets.example.yaml")


def test_the_account_of_the_runs_may_read_no_secret_but_that_of_the_artifacts() -> None:
    (role,) = [each for each in built(DEPLOY / "runs") if each["kind"] == "Role"]
    rules = [rule for rule in role["rules"] if "secrets" in rule["resources"]]
    assert [(rule["resourceNames"], rule["verbs"]) for rule in rules] == [(["mlpipeline-minio-artifact"], ["get"])]
    assert not any("*" in rule["verbs"] or "*" in rule["resources"] for rule in role["rules"])


def test_the_server_and_its_jobs_see_the_private_ca() -> None:
    """Where the ConfigMap adfm-ca is mounted, libpq, boto3 and adfm look for it."""
    for _, pod, container in containers():
        if container["name"] == "postgres":
            continue
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert mounts["ca"] == environment.CA_FOLDER, container["name"]
        (volume,) = [each for each in pod["volumes"] if each["name"] == "ca"]
        assert volume["configMap"] == {"name": environment.CA, "optional": True}
    defaults = next(each["data"] for each in loaded("server/database.yaml") if each["metadata"]["name"] == "database")
    assert defaults["PGSSLROOTCERT"] == f"{environment.CA_FOLDER}/{environment.CA_FILE}"
