"""Detect a pod, and a task of a pipeline on a cluster."""

import os

STARTED = "ADFM_RUN_STARTED"  # start time of a local run, set by `pipelines.local`


def inside() -> bool:
    """Return whether this process runs in a pod, in each of which Kubernetes sets the address of its API."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def is_task() -> bool:
    """Return whether this process is a task on a cluster, whose files are lost with its pod."""
    return inside() and STARTED not in os.environ  # a local run may be in a pod as well: that of a notebook
