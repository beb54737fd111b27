"""Fixtures of the registry's tests that the tests of serving use too."""

from tests.registry.conftest import make_evaluation, make_shards, mlflow_server, server

__all__ = ["make_evaluation", "make_shards", "mlflow_server", "server"]
