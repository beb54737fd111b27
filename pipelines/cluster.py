"""Looks at the cluster of the runs before one is asked for, where that may be done from here."""

from adfm.errors import AdfmError

_SECRET, _KEY = "adfm-mlflow", "uri"
_TIMEOUT = 5  # seconds


def require_secret(namespace: str, service_account: str) -> None:
    """Refuses if the secret is missing without which the first task of every run fails: that of MLflow's address.

    Asked is the cluster that a pod is in, or that `kubectl` would talk to, if it is the one of the runs: their service
    account is there. Where there is none, or it does not answer or does not let us look, nothing is refused: the first
    task says it then.

    Args:
        namespace: Of the runs.
        service_account: Of their pods.

    Raises:
        AdfmError: The secret, or its key, is missing.
    """
    import urllib3
    import yaml
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException

    settings = client.Configuration()
    settings.retries = False
    for load in (config.load_incluster_config, config.load_kube_config):
        try:
            load(client_configuration=settings)
            break
        except (config.ConfigException, OSError, yaml.YAMLError):
            continue
    else:
        return
    with client.ApiClient(settings) as connection:
        core = client.CoreV1Api(connection)
        try:
            core.read_namespaced_service_account(service_account, namespace, _request_timeout=_TIMEOUT)
        except (ApiException, urllib3.exceptions.HTTPError):
            return
        try:
            keys = core.read_namespaced_secret(_SECRET, namespace, _request_timeout=_TIMEOUT).data or {}
        except ApiException as error:
            if error.status != 404:
                return
            keys = {}
        except urllib3.exceptions.HTTPError:
            return
    if not keys.get(_KEY):
        raise AdfmError(
            f"the namespace {namespace} of {settings.host} has no secret {_SECRET} with the key {_KEY}, MLflow's "
            "address; make it (deploy/secrets.example.yaml). If runs go to another cluster, let kubectl's context be "
            "that one."
        )
