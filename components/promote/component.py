"""Put an approved version into production."""

import os

from kfp import dsl


@dsl.component(base_image=os.environ.get("ADFM_CPU_IMAGE", "localhost/adfm:cpu"), install_kfp_package=False)
def promote(version: str, settings: str, by: str, history: dsl.Output[dsl.HTML]):
    """Without a version, whatever is newly approved; the page is the history of production."""
    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.process import retries

        tasks.name_artifacts({"History of production": history})
        retries.again(lambda: tasks.promote(version, settings, by, history.path), "the promotion")
