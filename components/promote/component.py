"""Put an approved version into production."""

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("promote"), install_kfp_package=False)
def promote(version: str, settings: str, by: str, history: dsl.Output[dsl.HTML]):
    """Without a version, whatever is newly approved; the page is the history of production."""
    from adfm.kubeflow import tasks

    with tasks.stage():
        from adfm.process import retries

        tasks.name_artifacts({"History of production": history})
        retries.again(lambda: tasks.promote(version, settings, by, history.path), "the promotion")
