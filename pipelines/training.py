"""From a data set to a registered, gated version, as a pipeline of Kubeflow Pipelines.

python -m pipelines.training run                             here, in subprocesses
python -m pipelines.training compile                         to pipelines/compiled/training.yaml
python -m pipelines.training submit --host https://…         on a cluster
"""

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

from kfp import dsl, kubernetes

from adfm.errors import AdfmError
from adfm.params import Params
from adfm.pods import WORKSPACE, WORKSPACE_CLAIM
from adfm.tasks import GPUS, check_gpus, fixed_revision
from components.check.component import check
from components.convert.component import convert, inspect_part
from components.evaluate.component import evaluate
from components.fetch.component import fetch
from components.notify.component import notify
from components.register.component import register
from components.train.component import train, train_on_nodes
from components.validate.component import validate
from components.warmup.component import warmup
from pipelines.tasks import give, give_gpu

GPU_IMAGE = os.environ.get("ADFM_GPU_IMAGE", "localhost/adfm:gpu")


@dsl.pipeline(name="conversion")
def conversion(raw: dsl.Input[dsl.Dataset], parts: list[str], settings: str) -> dsl.Dataset:
    """Raw data to shards, the parts side by side.

    A pipeline of its own, because in a loop KFP's local runner takes the output of another task for the loop's item.
    """
    with dsl.ParallelFor(parts, name="inspect") as part:
        inspected = inspect_part(raw=raw, part=part, settings=settings)
        give(inspected, "inspect-part")
    converted = convert(raw=raw, parts=dsl.Collected(inspected.outputs["inspected"]), settings=settings)
    give(converted, "convert")
    return converted.outputs["shards"]


def _path(name: str, settings: Any, revision: Any, parts: Any, ui: Any, gpus: Any, train: Callable[..., Any]) -> None:
    """The tasks of both; `train` makes the one of shards, warmed-up model and settings."""
    run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    told = notify(pipeline=name, run=run, settings=settings, ui=ui)
    give(told, "notify")
    with dsl.ExitHandler(told, name="path"):
        # KFP compiles parameters for accelerators into a sub-DAG only if a task of it takes them as arguments as well.
        checked = check(settings=settings, revision=revision, gpu_type=gpus[0], num_gpus=gpus[1])
        give(checked, "check")
        fetched = fetch(
            source=checked.outputs["source"], name=checked.outputs["name"], revision=checked.outputs["revision"]
        )
        give(fetched, "fetch")
        converted = conversion(
            raw=fetched.outputs["raw"], parts=parts, settings=checked.outputs["conversion"]
        ).set_display_name("convert")
        shards = converted.output
        validated = validate(shards=shards, settings=checked.outputs["validation"])
        give(validated, "validate")
        whole = checked.outputs["settings"]
        warmed = warmup(shards=shards, validation=validated.outputs["report"], settings=whole)
        give_gpu(warmed, "warmup", *gpus)
        model = train(shards, warmed.outputs["model"], whole).outputs["model"]
        evaluated = evaluate(shards=shards, warmup=warmed.outputs["model"], model=model, settings=whole)
        give_gpu(evaluated, "evaluate", *gpus)
        registered = register(
            model=model,
            shards=shards,
            evaluation=evaluated.outputs["evaluation"],
            settings=whole,
            run=run,
            revision=checked.outputs["revision"],
        )
        give_gpu(registered, "register", *gpus)


@dsl.pipeline(name="adfm-training", description="Data, validation, training, evaluation, registration and gate.")
def training(
    settings: str = "",
    data_revision: str = "",
    parts: list[str] = ["1/2", "2/2"],
    gpu_type: str = "nvidia.com/gpu",
    num_gpus: int = 0,
    node_selector: dict[str, Any] = {},
    tolerations: list[dict[str, Any]] = [],
    ui: str = "",
):
    """The whole path, each task on one machine.

    Args:
        settings: Text of a `params.yaml`; empty: the embedded run.
        data_revision: What tells this content of `fetch.source` from an earlier one; data stages are cached by it.
            Empty: what the source says of itself, else the time, and nothing is taken from the cache.
        parts: Conversion is divided into these, written as I/N.
        gpu_type: Resource that stands for a GPU on the cluster's nodes.
        num_gpus: GPUs of a machine; 0: none.
        node_selector: Labels of the nodes for the tasks that use GPUs.
        tolerations: Of taints of those nodes.
        ui: Address of the pipelines' pages, for the link in the notification.
    """
    gpus = (gpu_type, num_gpus, node_selector, tolerations)

    def on_one(shards: Any, warmed: Any, whole: Any) -> Any:
        trained = train(shards=shards, warmup=warmed, settings=whole, num_gpus=num_gpus)
        give_gpu(trained, "train", *gpus)
        return trained

    _path("adfm-training", settings, data_revision, parts, ui, gpus, on_one)


@dsl.pipeline(name="adfm-training-on-nodes", description="As adfm-training; several machines train together.")
def training_on_nodes(
    settings: str = "",
    data_revision: str = "",
    parts: list[str] = ["1/2", "2/2"],
    gpu_type: str = "nvidia.com/gpu",
    num_gpus: int = 1,
    num_nodes: int = 2,
    node_selector: dict[str, Any] = {},
    tolerations: list[dict[str, Any]] = [],
    ui: str = "",
):
    """The whole path with a TrainJob of Kubeflow Trainer on `num_nodes` machines; the rest is as of `training`.

    A pipeline of its own, because the volume that the machines share cannot be optional.
    """
    gpus = (gpu_type, num_gpus, node_selector, tolerations)

    def on_several(shards: Any, warmed: Any, whole: Any) -> Any:
        trained = train_on_nodes(
            shards=shards,
            warmup=warmed,
            settings=whole,
            num_nodes=num_nodes,
            num_gpus=num_gpus,
            gpu_type=gpu_type,
            node_selector=node_selector,
            tolerations=tolerations,
            image=GPU_IMAGE,
            run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            workspace=WORKSPACE,
            claim=WORKSPACE_CLAIM,
        )
        give(trained, "train-on-nodes")
        kubernetes.mount_pvc(trained, WORKSPACE_CLAIM, WORKSPACE)
        return trained

    _path("adfm-training-on-nodes", settings, data_revision, parts, ui, gpus, on_several)


def options(parser: argparse.ArgumentParser) -> None:
    """The parameters of the pipeline as options."""
    parser.add_argument("--data-revision", metavar="TEXT", default="", help="tells this data from an earlier one")
    parser.add_argument("--parts", metavar="N", type=_positive, default=2, help="conversion goes in N parts; 2")
    parser.add_argument(
        "--gpu-type", metavar="NAME", type=_gpu, default=GPUS[0], help=f"one of {', '.join(GPUS)}, …/mig-…"
    )
    parser.add_argument("--num-gpus", metavar="N", type=_count, default=0, help="GPUs of a machine; 0")
    parser.add_argument(
        "--num-nodes", metavar="N", type=_positive, help="train by a TrainJob on N machines, checkpoints on a volume"
    )
    parser.add_argument("--node-selector", metavar="KEY=VALUE", type=_pair, action="append", default=[])
    parser.add_argument("--toleration", metavar="KEY[=VALUE][:EFFECT]", type=_toleration, action="append", default=[])
    parser.add_argument("--ui", metavar="URL", default="", help="of the pages, for links; the host by default")


def arguments(args: argparse.Namespace, asked: Params) -> tuple[Any, dict[str, Any]]:
    """The pipeline that was asked for, and its arguments, but for the settings.

    Raises:
        AdfmError: A TrainJob is to run here.
    """
    given = {
        "data_revision": args.data_revision or fixed_revision(asked.fetch.source),
        "parts": [f"{part}/{args.parts}" for part in range(1, args.parts + 1)],
        "gpu_type": args.gpu_type,
        "num_gpus": args.num_gpus,
        "node_selector": dict(args.node_selector),
        "tolerations": args.toleration,
        "ui": args.ui,
    }
    if args.num_nodes is None:
        return training, given
    if args.verb == "run":
        raise AdfmError("--num-nodes: a TrainJob needs a cluster; leave it out here.")
    return training_on_nodes, given | {"num_nodes": args.num_nodes}


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _gpu(text: str) -> str:
    try:
        check_gpus(text, 0)
    except AdfmError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _toleration(text: str) -> dict[str, str]:
    found = re.fullmatch(r"([^=:]+)(?:=([^:]*))?(?::(NoSchedule|PreferNoSchedule|NoExecute))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY[=VALUE][:EFFECT] with an effect of Kubernetes")
    key, value, effect = found.groups()
    tolerated = (
        {"key": key, "operator": "Exists"} if value is None else {"key": key, "operator": "Equal", "value": value}
    )
    return tolerated | ({"effect": effect} if effect else {})


PIPELINES = {"training": training, "training-on-nodes": training_on_nodes}


if __name__ == "__main__":
    from pipelines.command import main

    raise SystemExit(main(PIPELINES, options, arguments))
