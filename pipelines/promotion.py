"""Put approved versions into production, as a pipeline of Kubeflow Pipelines.

python -m pipelines.promotion run | compile | submit, as for pipelines.training.
"""

import argparse
from typing import Any

from kfp import dsl

from adfm.kubeflow.notification import PROMOTION
from adfm.params import Params
from components.notify.component import notify
from components.promote.component import promote
from pipelines.tasks import configure


@dsl.pipeline(name=PROMOTION, description="Puts an approved version into production.")
def promotion(settings: str = "", version: str = "", by: str = "adfm-promotion", ui: str = ""):
    """Promotes.

    Args:
        settings: Text of a `params.yaml`; empty: the embedded run.
        version: Number of the version; empty: the newest one that is approved.
        by: Who promotes, for the history.
        ui: Address of the pipelines' pages, for the link in the notification.
    """
    notify_task = configure(notify(pipeline=PROMOTION, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER, settings=settings, ui=ui))
    with dsl.ExitHandler(notify_task, name="path"):
        configure(promote(version=version, settings=settings, by=by))


def options(parser: argparse.ArgumentParser) -> None:
    """Add the parameters of the pipeline as options."""
    parser.add_argument("--version", metavar="N", default="", help="number; the newest approved one by default")
    parser.add_argument("--by", metavar="NAME", default="adfm-promotion", help="who promotes, for the history")
    parser.add_argument(
        "--ui",
        metavar="URL",
        default="",
        help="of KFP's pages, e.g. https://kubeflow.example.com/pipeline; notifications have no link without it",
    )


def arguments(args: argparse.Namespace, params: Params) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and its arguments without the settings."""
    return promotion, {"version": args.version, "by": args.by, "ui": args.ui}


PIPELINES = {"promotion": promotion}


if __name__ == "__main__":
    from pipelines.command import main

    raise SystemExit(main(PIPELINES, options, arguments))
