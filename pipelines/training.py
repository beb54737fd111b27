"""From a data set to a registered, gated version, as a pipeline of Kubeflow Pipelines.

python -m pipelines.training run                             here, in subprocesses
python -m pipelines.training compile                         to pipelines/compiled/training*.yaml
python -m pipelines.training submit --host https://…         on a cluster

Conversion in parts and training on several machines are variants: `PIPELINES`. All have one name: KFP's cache goes by
the pipeline's name and by image, command, inputs and outputs of a task (`getFingerPrint` in kubeflow/pipelines
backend/src/v2/driver/cache.go), so that data fetched and converted for one variant serve the others.
"""

import argparse
import re
from typing import Any, NamedTuple

from kfp import dsl

from adfm.errors import AdfmError
from adfm.kubeflow.resources import MACHINE, WORKSPACE, WORKSPACE_CLAIM, image
from adfm.kubeflow.tasks import GPUS, check_gpus, fixed_revision
from adfm.params import Params
from components.check.component import check
from components.convert.component import convert, convert_parts, inspect_part
from components.evaluate.component import evaluate
from components.fetch.component import fetch
from components.notify.component import notify
from components.register.component import register
from components.sft.component import sft
from components.train.component import train, train_on_nodes
from pipelines.tasks import Gpus, configure

NAME = "adfm-training"


def _run(settings: Any, revision: Any, ui: Any, gpus: Gpus, parts: Any = None, num_nodes: Any = None) -> None:
    """The tasks of every variant: with `parts`, conversion in parts; with `num_nodes`, training on several machines."""
    run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    notify_task = configure(notify(pipeline=NAME, run=run, settings=settings, ui=ui))
    with dsl.ExitHandler(notify_task, name="path"):
        checked = configure(
            check(
                settings=settings,
                run=run,
                revision=revision,
                # KFP compiles parameters for accelerators into a sub-DAG only if a task of it takes them as arguments.
                gpu_type=gpus.kind,
                num_gpus=gpus.number,
                num_nodes=0 if num_nodes is None else num_nodes,
            )
        ).outputs
        fetched = configure(fetch(source=checked["source"], name=checked["name"], revision=checked["revision"])).outputs
        shards = _shards(fetched["raw"], checked, parts)
        start, model = _models(shards, checked["settings"], gpus, num_nodes)
        evaluated = configure(
            evaluate(shards=shards, sft=start, model=model, settings=checked["settings"]), gpus
        ).outputs
        configure(
            register(
                model=model,
                shards=shards,
                evaluation=evaluated["evaluation"],
                settings=checked["settings"],
                run=run,
                revision=checked["revision"],
            ),
            gpus,
        )


def _shards(raw: Any, checked: dict[str, Any], parts: Any) -> Any:
    if parts is None:
        return configure(convert(raw=raw, settings=checked["conversion"])).outputs["shards"]
    task = conversion(raw=raw, parts=parts, inspection=checked["inspection"], settings=checked["conversion"])
    return task.set_display_name("convert").outputs["shards"]


class Conversion(NamedTuple):
    """Outputs of `conversion`, which KFP would name `Output` if there were no name for it here."""

    shards: dsl.Dataset


@dsl.pipeline(name="conversion")
def conversion(raw: dsl.Input[dsl.Dataset], parts: list[str], inspection: str, settings: str) -> Conversion:
    """Raw data to shards that passed validation, the images inspected part by part."""
    # A pipeline of its own, because in a loop KFP's local runner takes the output of another task for the loop's item
    # (`create_parameter_loop_iteration_task_spec` in kfp/local/orchestrator/task_spec_utils.py).
    with dsl.ParallelFor(parts, name="parts") as part:
        inspected = configure(inspect_part(raw=raw, part=part, settings=inspection)).outputs["inspected"]
    task = configure(convert_parts(raw=raw, parts=dsl.Collected(inspected), settings=settings))
    return Conversion(shards=task.outputs["shards"])


def _models(shards: Any, settings: Any, gpus: Gpus, num_nodes: Any) -> tuple[Any, Any]:
    """The model after the cold start, and the trained one."""
    if num_nodes is None:
        models = configure(train(shards=shards, settings=settings, num_gpus=gpus.number), gpus).outputs
        return models["sft"], models["model"]
    start = configure(sft(shards=shards, settings=settings), gpus).outputs["sft"]
    task = train_on_nodes(
        shards=shards,
        sft=start,
        settings=settings,
        num_nodes=num_nodes,
        num_gpus=gpus.number,
        gpu_type=gpus.kind,
        node_selector=gpus.node_selector,
        tolerations=gpus.tolerations,
        image=image(MACHINE),
        run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        workspace=WORKSPACE,
        claim=WORKSPACE_CLAIM,
    )
    return start, configure(task).outputs["model"]


@dsl.pipeline(name=NAME, description="Data, validation, training, evaluation, registration and gate.")
def training(
    settings: str = "",
    data_revision: str = "",
    gpu_type: str = "nvidia.com/gpu",
    num_gpus: int = 0,
    node_selector: dict[str, Any] = {},
    tolerations: list[dict[str, Any]] = [],
    ui: str = "",
):
    """The whole path, each task in one pod.

    Args:
        settings: Text of a `params.yaml`; empty: the embedded run.
        data_revision: What tells this content of `fetch.source` from an earlier one; data stages are cached by it.
            Empty: what the source says of itself, else the time, and nothing is taken from the cache.
        gpu_type: Resource that stands for a GPU on the cluster's nodes.
        num_gpus: GPUs of a machine; 0: none.
        node_selector: Labels of the nodes for the tasks that use GPUs.
        tolerations: Of taints of those nodes.
        ui: Address of the pipelines' pages, for the link in the notification.
    """
    _run(settings, data_revision, ui, Gpus(gpu_type, num_gpus, node_selector, tolerations))


@dsl.pipeline(name=NAME, description="As the default one; images are inspected in several pods side by side.")
def training_in_parts(
    settings: str = "",
    data_revision: str = "",
    parts: list[str] = ["1/2", "2/2"],
    gpu_type: str = "nvidia.com/gpu",
    num_gpus: int = 0,
    node_selector: dict[str, Any] = {},
    tolerations: list[dict[str, Any]] = [],
    ui: str = "",
):
    """The whole path; images are inspected in as many pods as there are `parts`, written as I/N.

    KFP 2.17's page shows the conversion as running for ever where all of it came from the cache; the run ends as it
    should.
    """
    _run(settings, data_revision, ui, Gpus(gpu_type, num_gpus, node_selector, tolerations), parts)


@dsl.pipeline(name=NAME, description="As the default one; several machines train together.")
def training_on_nodes(
    settings: str = "",
    data_revision: str = "",
    gpu_type: str = "nvidia.com/gpu",
    num_gpus: int = 1,
    num_nodes: int = 2,
    node_selector: dict[str, Any] = {},
    tolerations: list[dict[str, Any]] = [],
    ui: str = "",
):
    """The whole path with a TrainJob of Kubeflow Trainer on `num_nodes` machines.

    A variant of its own, because the volume that the machines share cannot be optional.
    """
    _run(settings, data_revision, ui, Gpus(gpu_type, num_gpus, node_selector, tolerations), num_nodes=num_nodes)


@dsl.pipeline(name=NAME, description="As the default one; several pods inspect images, several machines train.")
def training_in_parts_on_nodes(
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
    """Both variants together."""
    _run(settings, data_revision, ui, Gpus(gpu_type, num_gpus, node_selector, tolerations), parts, num_nodes)


PIPELINES = {
    "training": training,
    "training-in-parts": training_in_parts,
    "training-on-nodes": training_on_nodes,
    "training-in-parts-on-nodes": training_in_parts_on_nodes,
}
"""The variants, by the file that they are compiled to."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add the parameters of the pipeline as options."""
    parser.add_argument("--data-revision", metavar="TEXT", default="", help="tells this data from an earlier one")
    parser.add_argument(
        "--parts",
        metavar="N",
        type=_positive,
        help="inspect the images in N pods side by side; convert in one pod by default",
    )
    parser.add_argument(
        "--gpu-type", metavar="NAME", type=_gpu, default=GPUS[0], help=f"one of {', '.join(GPUS)}, …/mig-…"
    )
    parser.add_argument("--num-gpus", metavar="N", type=_count, default=0, help="GPUs of a machine; 0")
    parser.add_argument(
        "--num-nodes", metavar="N", type=_positive, help="train by a TrainJob on N machines, checkpoints on a volume"
    )
    parser.add_argument("--node-selector", metavar="KEY=VALUE", type=_pair, action="append", default=[])
    parser.add_argument("--toleration", metavar="KEY[=VALUE][:EFFECT]", type=_toleration, action="append", default=[])
    parser.add_argument(
        "--ui",
        metavar="URL",
        default="",
        help="of KFP's pages, e.g. https://kubeflow.example.com/pipeline; notifications have no link without it",
    )


def arguments(args: argparse.Namespace, params: Params) -> tuple[Any, dict[str, Any]]:
    """The variant that the options choose, and its arguments without the settings.

    Raises:
        AdfmError: `--num-nodes` with the verb `run`.
    """
    if args.num_nodes is not None and args.verb == "run":
        raise AdfmError("--num-nodes: a TrainJob needs a cluster; leave it out here.")
    values = {
        "data_revision": args.data_revision or fixed_revision(params.fetch.source),
        "gpu_type": args.gpu_type,
        "num_gpus": args.num_gpus,
        "node_selector": dict(args.node_selector),
        "tolerations": args.toleration,
        "ui": args.ui,
    }
    variant = "training"
    if args.parts is not None:
        variant += "-in-parts"
        values["parts"] = [f"{part}/{args.parts}" for part in range(1, args.parts + 1)]
    if args.num_nodes is not None:
        variant += "-on-nodes"
        values["num_nodes"] = args.num_nodes
    return PIPELINES[variant], values


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
    match = re.fullmatch(r"([^=:]+)(?:=([^:]*))?(?::(NoSchedule|PreferNoSchedule|NoExecute))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY[=VALUE][:EFFECT] with an effect of Kubernetes")
    key, value, effect = match.groups()
    tolerated = (
        {"key": key, "operator": "Exists"} if value is None else {"key": key, "operator": "Equal", "value": value}
    )
    return tolerated | ({"effect": effect} if effect else {})


if __name__ == "__main__":
    from pipelines.command import main

    raise SystemExit(main(PIPELINES, options, arguments))
