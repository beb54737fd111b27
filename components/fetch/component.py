"""Fetches a raw data set and lists it in a manifest."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_CPU_IMAGE", "localhost/adfm:cpu"), install_kfp_package=False)
def fetch(source: str, name: str, revision: str, raw: dsl.Output[dsl.Dataset]):
    """Into the folder `name` of the artifact: a data set has the name of its folder.

    The revision names the content of the source: it is no more than a part of the key of the cache.
    """
    from pathlib import Path

    from adfm import tasks
    from adfm.data.sources import fetch

    tasks.begin("")
    fetch(source, Path(raw.path) / name)
    raw.metadata.update(source=source, name=name, revision=revision)
