"""The command line of a pipeline: run it here, compile it, or submit it to a cluster."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adfm import cli, params, tracking
from adfm.errors import AdfmError

ROOT = Path(__file__).parents[1]
COMPILED = ROOT / "pipelines" / "compiled"

Options = Callable[[argparse.ArgumentParser], None]
Arguments = Callable[[argparse.Namespace, params.Params], dict[str, Any]]


def main(pipeline: Any, options: Options, arguments: Arguments, argv: Sequence[str] | None = None) -> int:
    """Does what the command line says.

    Args:
        pipeline: What `dsl.pipeline` made.
        options: Adds the options that are parameters of the pipeline.
        arguments: Makes the pipeline's arguments, but for `settings`, of what was asked.
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0, or 1 for an error that was explained on stderr.
    """
    args = _parse(pipeline, options, argv)
    cli.set_environment()
    try:
        args.verb(pipeline, arguments, args)
    except AdfmError as error:
        print(f"{pipeline.name}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write(pipeline: Any, file: Path) -> None:
    """Compiles a pipeline to IR; the same code and images give the same bytes."""
    from kfp import compiler

    file.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(file))


def _parse(pipeline: Any, options: Options, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(pipeline.name, description=pipeline.description)
    verbs = parser.add_subparsers(metavar="<verb>", required=True, title="verbs")

    run = verbs.add_parser("run", help="run it here, in subprocesses")
    run.add_argument("--root", metavar="DIR", type=Path, default=Path(".kfp"), help="for what tasks write; .kfp")
    run.add_argument(
        "--in-containers", action="store_true", help="each task in its image, by the Docker-compatible DOCKER_HOST"
    )
    run.set_defaults(verb=_run)

    compiled = verbs.add_parser("compile", help="write the IR that a cluster runs")
    compiled.add_argument("--out", metavar="FILE", type=Path, help="pipelines/compiled/<name>.yaml by default")
    compiled.set_defaults(verb=_compile)

    submit = verbs.add_parser("submit", help="run it on a cluster; what runs there already is not run again")
    submit.add_argument("--host", metavar="URL", help="of the KFP API; KF_PIPELINES_ENDPOINT by default")
    submit.add_argument("--experiment", metavar="NAME", default="adfm", help="adfm by default")
    submit.add_argument("--namespace", metavar="NAME", help="of the runs, where KFP serves several users")
    submit.add_argument("--service-account", metavar="NAME", default="adfm-pipeline", help="adfm-pipeline by default")
    submit.add_argument("--schedule", metavar="CRON", help="again and again; six fields, seconds first: '0 0 3 * * *'")
    submit.set_defaults(verb=_submit)

    for each in (run, submit):
        each.add_argument("--params", metavar="FILE", type=Path, help="settings; params.yaml, if there is one")
        each.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting; repeatable")
        options(each)
    return parser.parse_args(argv)


def _compile(pipeline: Any, arguments: Arguments, args: argparse.Namespace) -> None:
    write(pipeline, args.out or COMPILED / f"{pipeline.name.removeprefix('adfm-')}.yaml")


def _run(pipeline: Any, arguments: Arguments, args: argparse.Namespace) -> None:
    from pipelines import local

    asked = params.load(args.params, args.set)
    local.run(pipeline, _all(arguments, args, asked), args.root, args.in_containers)


def _submit(pipeline: Any, arguments: Arguments, args: argparse.Namespace) -> None:
    from pipelines import server

    asked = params.load(args.params, args.set)
    given = _all(arguments, args, asked)
    server.submit(
        pipeline,
        given,
        host=args.host,
        experiment=args.experiment,
        namespace=args.namespace,
        service_account=args.service_account,
        schedule=args.schedule,
        once=bool(given.get("data_revision")),
    )


def _all(arguments: Arguments, args: argparse.Namespace, asked: params.Params) -> dict[str, Any]:
    return {"settings": tracking.settings(asked), **arguments(args, asked)}
