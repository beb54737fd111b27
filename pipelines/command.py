"""The command line of a pipeline: run it here, compile it, or submit it to a cluster."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adfm import cli, params, tracking
from adfm.errors import AdfmError
from adfm.process import environment
from pipelines import local, server
from pipelines.ir import write

ROOT = Path(__file__).parents[1]
COMPILED = ROOT / "pipelines" / "compiled"

Options = Callable[[argparse.ArgumentParser], None]
Arguments = Callable[[argparse.Namespace, params.Params], tuple[Any, dict[str, Any]]]


def main(
    pipelines: Mapping[str, Any], options: Options, arguments: Arguments, argv: Sequence[str] | None = None
) -> int:
    """Run, compile or submit a pipeline, as the command line says.

    Args:
        pipelines: Stem of the compiled file -> what `dsl.pipeline` made: the pipelines that the options choose from,
            which may be variants of one name.
        options: Adds the options that are parameters of the pipelines.
        arguments: Chooses the pipeline and makes its arguments, without `settings`, of the options and the settings.
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0, or 1 for an error that was explained on stderr.
    """
    first = next(iter(pipelines.values()))
    args = _parse(first, options, argv)
    try:
        environment.set_environment()
        if args.verb == "compile":
            for stem, pipeline in pipelines.items():
                write(pipeline, args.out / f"{stem}.yaml")
            return 0
        settings = params.load(args.params, args.set)
        pipeline, values = arguments(args, settings)
        values = {"settings": tracking.settings(settings), **values}
        if args.verb == "run":
            local.run(pipeline, values, args.root, args.in_containers)
            return 0
        server.submit(
            pipeline,
            values,
            host=args.host,
            experiment=args.experiment,
            namespace=args.namespace,
            service_account=args.service_account,
            variant=next(stem for stem, each in pipelines.items() if each is pipeline),
            schedule=args.schedule,
            once=bool(values.get("data_revision")),
        )
    except AdfmError as error:
        print(f"{first.name}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parse(pipeline: Any, options: Options, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(pipeline.name, description=pipeline.description)
    verbs = parser.add_subparsers(dest="verb", metavar="<verb>", required=True, title="verbs")

    run = verbs.add_parser("run", help="run it here, in subprocesses")
    run.add_argument("--root", metavar="DIR", type=Path, default=Path(".kfp"), help="for what tasks write; .kfp")
    run.add_argument(
        "--in-containers", action="store_true", help="each task in its image, by the Docker-compatible DOCKER_HOST"
    )

    compiled = verbs.add_parser("compile", help="write the IR that a cluster runs")
    compiled.add_argument("--out", metavar="DIR", type=Path, default=COMPILED, help="pipelines/compiled by default")

    submit = verbs.add_parser("submit", help="run it on a cluster; what runs there already is not run again")
    submit.add_argument("--host", metavar="URL", help="of the KFP API; KF_PIPELINES_ENDPOINT by default")
    submit.add_argument("--experiment", metavar="NAME", default="adfm", help="adfm by default")
    submit.add_argument(
        "--namespace", metavar="NAME", help="of the runs, where KFP serves several users: your profile's"
    )
    submit.add_argument("--service-account", metavar="NAME", default="adfm-pipeline", help="adfm-pipeline by default")
    submit.add_argument(
        "--schedule",
        metavar="CRON",
        help="again and again; six fields, seconds first: '0 0 3 * * *'; replaces that of the same data and model",
    )

    for each in (run, submit):
        cli.add_settings(each)
        options(each)
    return parser.parse_args(argv)
