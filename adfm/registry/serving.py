"""Loader of the versions that were registered before `adfm.serving.scoring`: MLflow imports it by this name."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("adfm.serving.scoring")
