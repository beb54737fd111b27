"""Report how a run ended, and remove what it left on the cluster."""

from kfp import dsl

from adfm.kubeflow.resources import image


@dsl.component(base_image=image("notify"), install_kfp_package=False)
def notify(status: dsl.PipelineTaskFinalStatus, pipeline: str, run: str, settings: str, ui: str) -> str:
    """State, gate verdict and link, to the chat channel that the secret adfm-alerts names, if any, and to the log."""
    from adfm.kubeflow import tasks

    with tasks.stage(tolerant=True):
        from adfm.kubeflow import nodes, notification

        nodes.end(run)
        ended = notification.Status(
            state=status.state,
            error_message=status.error_message or "",
            pipeline_job_resource_name=status.pipeline_job_resource_name,
            pipeline_task_name=status.pipeline_task_name,
        )
        return notification.notify(pipeline, ended, run, settings, ui)
