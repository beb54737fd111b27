"""Turns a raw data set into Parquet shards: first its parts side by side, then all of them into one."""

import os
from typing import List  # noqa: UP035

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_CPU_IMAGE", "localhost/adfm:cpu"), install_kfp_package=False)
def inspect_part(raw: dsl.Input[dsl.Dataset], part: str, settings: str, inspected: dsl.Output[dsl.Dataset]):
    """Looks at the images of one part, which is written as I/N."""
    from pathlib import Path

    from adfm import tasks
    from adfm.data.conversion import inspect_part

    number, of = part.split("/")
    named = Path(raw.path) / raw.metadata["name"]
    inspect_part(named, Path(inspected.path), tasks.begin(settings), int(number), int(of))


@dsl.component(base_image=os.environ.get("ADFM_CPU_IMAGE", "localhost/adfm:cpu"), install_kfp_package=False)
def convert(
    raw: dsl.Input[dsl.Dataset],
    parts: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    settings: str,
    shards: dsl.Output[dsl.Dataset],
):
    """Divides the inspected images into splits and writes the shards."""
    from pathlib import Path

    from adfm import tasks
    from adfm.data.conversion import convert

    named = Path(raw.path) / raw.metadata["name"]
    convert(named, Path(shards.path), tasks.begin(settings), [Path(part.path) for part in parts])
