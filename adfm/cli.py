"""The command line: `adfm <verb>`, one verb a stage, and the everyday ones. Each calls one function.

adfm fetch synthetic:// data/raw/synthetic
adfm convert data/raw/synthetic data/shards
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm import __version__
from adfm.errors import AdfmError
from adfm.process.environment import set_environment
from adfm.process.stopping import Stopped, Terminated, terminable
from adfm.text import printable_output

if TYPE_CHECKING:
    from adfm.params import Params

Run = Callable[[argparse.Namespace, "Params"], int | None]

_DESCRIPTION = "Adapt a vision-language model to finding defects: data, training, evaluation, registration."

_RENAMED = {"warmup": "sft"}
_MOVED = {"ablate": "ablation", "tiny-base": "tiny-base"}
"""Verbs of version 0.1 that `experiments` has now; their old names go with the next release."""

_EXAMPLE = """\
from a data set to a registered model, by hand (`make repro` does the same, and runs only what changed):
  adfm check
  adfm fetch synthetic:// data/raw/synthetic
  adfm convert data/raw/synthetic data/shards
  adfm validate data/shards
  adfm sft data/shards models/sft
  adfm train data/shards models/sft models/trained
  adfm detector data/shards models/detector
  adfm evaluate models/trained data/shards evaluation --compare detector=models/detector --compare sft=models/sft
  adfm register models/trained data/shards evaluation registration
  adfm approve 1
  adfm promote 1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0, or 1 for an error that was explained on stderr, 75 for a training that was told to stop and
        goes on when it is started again, 130 when interrupted, 141 when nobody reads the output any more, 143 when
        terminated. Wrong usage exits with 2, as argparse does.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _RENAMED:
        print(f"adfm: `adfm {argv[0]}` is now `adfm {_RENAMED[argv[0]]}`; the old name goes with 0.3", file=sys.stderr)
        argv = [_RENAMED[argv[0]], *argv[1:]]
    if argv and argv[0] in _MOVED:
        return _run_moved(argv[0], argv[1:])
    with printable_output():  # names in messages are whatever files and annotations hold
        return run(_parse(argv))


def run(args: argparse.Namespace) -> int:
    """Call `args.run` with the settings that `args.params` and `args.set` name, and turn errors into an exit status.

    Args:
        args: What a parser with `add_settings` has read.

    Returns:
        The exit status, as of `main`.
    """
    try:
        set_environment()
        from adfm.params import load

        with terminable():
            status = args.run(args, load(args.params, args.set)) or 0
        sys.stdout.flush()
        return int(status)
    except Stopped as stopped:
        print(f"adfm: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except AdfmError as error:
        return _fail(error, error.exit_code)
    except Terminated:
        return _fail("terminated; what was finished is kept", 143)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept", 130)
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        return _fail(f"{error.filename or 'output'}: no space is left on the disk; free some and start again.", 1)


def _run_moved(verb: str, argv: Sequence[str]) -> int:
    """Run an experiment under the name that it had in version 0.1."""
    print(f"adfm: `adfm {verb}` is now `python -m experiments {_MOVED[verb]}`, in a checkout of adfm", file=sys.stderr)
    return subprocess.call([sys.executable, "-m", "experiments", _MOVED[verb], *argv])


def _drop_output() -> None:
    """What stdout did not take is given up; the flush at exit would fail once more, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: object, status: int) -> int:
    print(f"adfm: error: {message}", file=sys.stderr)
    return status


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "adfm", description=_DESCRIPTION, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"adfm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="<verb>", required=True, title="verbs")

    leaves: list[argparse.ArgumentParser] = []

    def verb(name: str, run: Run, summary: str, under: Any = verbs) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = under.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        leaves.append(added)
        return added

    def group(name: str, summary: str) -> Any:
        added = verbs.add_parser(name, help=summary, description=summary)
        return added.add_subparsers(metavar="<verb>", required=True, title="verbs")

    add = verb(
        "params", _params, "print the first settings file with the values of the others and of --set; its comments stay"
    )
    add.add_argument("out", metavar="OUT", type=Path, nargs="?", help="file to write them to instead, e.g. params.yaml")

    add = verb("check", _check, "see that settings, model, MLflow and disk are fit for a run, before it starts")
    add.add_argument("out", metavar="OUT", type=Path, nargs="?", help="file to write when all is well")

    add = verb("fetch", _fetch, "fetch a raw data set and list it in a manifest")
    add.add_argument(
        "uri",
        metavar="URI",
        help="folder, .zip or .tar archive, s3://bucket/prefix, dvc://REPO@REV:PATH or synthetic://",
    )
    add.add_argument("out", metavar="DIR", type=Path, help="folder to write")

    add = verb("convert", _convert, "turn a raw data set into Parquet shards: boxes from masks, and splits")
    add.add_argument("raw", metavar="RAW", type=Path, help="folder of the raw data set")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write the shards to")
    add.add_argument(
        "--layout",
        metavar="L",
        dest="set",
        type="convert.layout={}".format,
        action="append",
        default=[],
        help="how RAW is laid out; the same as --set convert.layout=L",
    )
    several = add.add_mutually_exclusive_group()
    several.add_argument(
        "--part", metavar="I/N", type=_part, help="only look at the images of the I-th of N parts, for --parts"
    )
    several.add_argument("--parts", metavar="PART", type=Path, nargs="+", default=[], help="folders of all N parts")

    add = verb("validate", _validate, "judge shards; status 1 and a list of failures if they are not fit to train on")
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of shards")
    add.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", default=Path("reports/validation"), help="report folder"
    )

    add = verb("show", _show, "draw a contact sheet of raw data or shards, with boxes and masks")
    add.add_argument("folder", metavar="DIR", type=Path, help="folder of a raw data set or of shards")
    add.add_argument("--out", metavar="FILE", type=Path, help="page.html or sheet.png; show-<DIR>.html by default")
    add.add_argument("--split", choices=("train", "validation", "test"), help="show this split alone")
    add.add_argument("-n", dest="images", metavar="N", type=int, default=48, help="how many images; 48 by default")

    add = verb("sft", _sft, "teach the base model the form of the answer (supervised)")
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of shards")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write the adapter to")
    add.add_argument("--force", action="store_true", help="replace a finished model at OUT")

    add = verb("detector", _detector, "train the reference detector: a small head on pretrained features, no language")
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of shards")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write the detector to")
    add.add_argument("--force", action="store_true", help="replace a finished model at OUT")

    add = verb("train", _train, "train by GRPO; goes on from the last checkpoint if it was interrupted")
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of shards")
    add.add_argument("model", metavar="MODEL", type=Path, help="folder that sft or train wrote")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write the adapter to")
    add.add_argument("--force", action="store_true", help="replace a finished model at OUT")

    add = verb("resend", _resend, "send MLflow the figures of a training during which it was away")
    add.add_argument("folder", metavar="UNSENT", type=Path, help="folder that sft or train left: <OUT>.unsent")

    add = verb("evaluate", _evaluate, "let models answer the test split and compare them; goes on if interrupted")
    add.add_argument(
        "model",
        metavar="MODEL",
        help="the candidate: a folder that sft or train wrote, a registered version (models:/adfm@production, "
        "models:/adfm/3), or a base model's name",
    )
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of shards")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    add.add_argument(
        "--compare", metavar="NAME=MODEL", type=_named, action="append", default=[], help="a further model; repeatable"
    )

    add.add_argument(
        "--production",
        metavar="FILE",
        type=Path,
        help="compare with the versions in FILE, which `adfm production` wrote",
    )

    add.add_argument(
        "--folds", metavar="DIR", type=Path, help="show the cross-validation in DIR, which `adfm folds` wrote"
    )

    add = verb("folds", _folds, "cross-validate: train and judge a model for each of evaluate.folds; resumes")
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of shards")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write")

    add = verb("production", _production, "write which versions a candidate is judged against: production and anchor")
    add.add_argument("out", metavar="FILE", type=Path, help="JSON file to write")
    add.add_argument("--policy", metavar="FILE", type=Path, help="a second one: digest of the policy that judges")

    add = verb("predict", _predict, "let a model answer photographs, and draw what it says")
    add.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="a photograph, or a folder of them")
    add.add_argument("--model", metavar="MODEL", help="as of evaluate; the registered version in production by default")
    add.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for the pictures; `predictions` by default, none with --json"
    )
    add.add_argument("--json", action="store_true", help="print a line of JSON for each image")

    add = verb("serve", _serve, "verify a registered version and serve it over HTTP until stopped, as MLflow does")
    add.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="models:/adfm/3 or models:/adfm@alias; the version in production by default",
    )
    add.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="to listen on; 127.0.0.1 by default")
    add.add_argument("--port", metavar="PORT", type=int, default=5000, help="to listen on; 5000 by default")
    add.add_argument("--workers", metavar="N", type=int, default=1, help="processes, each with a model; 1 by default")
    add.add_argument(
        "--shadow",
        metavar="MODEL",
        help="another version, which answers the same images for the log alone (ADFM_SERVE_LOG, `adfm served`)",
    )

    add = verb("served", _served, "count what a served version answered and refused, and where its shadow differs")
    add.add_argument("logs", metavar="LOG", type=Path, nargs="+", help="file that ADFM_SERVE_LOG named")

    add = verb("report", _report, "write the page that shows an evaluation anew; evaluate writes one itself")
    add.add_argument("evaluation", metavar="EVALUATION", type=Path, help="folder that evaluate wrote")
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of the shards that were evaluated")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write: report.html and images/")

    add = verb("register", _register, "register a version in MLflow with the gate's decision; moves nothing")
    add.add_argument("model", metavar="MODEL", type=Path, help="folder that train wrote")
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of shards")
    add.add_argument("evaluation", metavar="EVALUATION", type=Path, help="folder that evaluate wrote")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    add.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=900,
        help="how long to wait for the service, where the own key is not one of it; 900 by default",
    )

    add = verb(
        "gate",
        _gate,
        "judge a prediction table by a policy; exit status 0 passed, 3 failed, 4 cannot tell, 2 bad input",
    )
    add.add_argument(
        "candidate", metavar="CANDIDATE", type=Path, nargs="?", help="predictions.parquet that evaluate wrote"
    )
    add.add_argument(
        "production", metavar="PRODUCTION", type=Path, nargs="?", help="the same images, by the version in production"
    )
    add.add_argument("--anchor", metavar="ANCHOR", type=Path, help="the same images, by the anchor")
    add.add_argument("--policy", metavar="FILE", type=Path, help="the policy; gate.yaml in this folder by default")
    add.add_argument("--look", metavar="N", type=int, default=1, help="candidates that these images judged, with this")
    add.add_argument("--json", action="store_true", help="print the whole decision as JSON")
    add.add_argument(
        "--plan",
        metavar="SHARDS",
        type=Path,
        help="print how many images of which kind the policy needs, and how many of them these shards have",
    )

    add = verb("promote", _promote, "give an approved version the alias production")
    add.add_argument(
        "version",
        metavar="VERSION",
        nargs="?",
        help="number of the version; the newest approved one, if any, by default",
    )
    add.add_argument("--by", metavar="NAME", help="who promotes; the user of this process by default")

    add = verb("rollback", _rollback, "give the alias production back to the version that had it before")
    add.add_argument("--to", metavar="VERSION", help="an earlier version; the one before by default")
    add.add_argument("--by", metavar="NAME", help="who rolls back; the user of this process by default")
    add.add_argument("--why", metavar="TEXT", default="", help="the reason, for the history")

    for name, run, summary in (
        ("approve", _approve, "approve a version, with your login at MLflow; moves nothing by itself"),
        ("reject", _reject, "reject a version, with your login at MLflow"),
    ):
        add = verb(name, run, summary)
        add.add_argument("version", metavar="VERSION", help="number of the version")
        add.add_argument("--reason", metavar="TEXT", default="", help="why, for the history")

    verb(
        "audit",
        _audit,
        "verify the signed history, the aliases and the files in production; exit status 2 if one is wrong",
    )

    policies = group("policy", "the policy of the gate that is registered on the model")
    add = verb("set", _policy_set, "set the policy, with your login at MLflow; the service registers it", policies)
    add.add_argument("file", metavar="FILE", type=Path, nargs="?", default=Path("gate.yaml"), help="gate.yaml")
    verb("show", _policy_show, "print the registered policy", policies)

    keys = group("keys", "the keys that sign versions and the history")
    add = verb("rotate", _keys_rotate, "confirm what retired keys of the service have signed, with today's", keys)
    add.add_argument("--by", metavar="NAME", help="who confirms; the user of this process by default")

    approvals = group("approvals", "follow what submitters and reviewers ask for in MLflow")
    for name, run, summary in (
        ("serve", _serve_approvals, "accept what is submitted and promote what is approved, until stopped"),
        ("health", _approvals_health, "whether the service in this folder has looked at MLflow lately, for a probe"),
    ):
        add = verb(name, run, summary, approvals)
        add.add_argument(
            "--poll", metavar="SECONDS", type=float, default=5, help="pause between two looks at MLflow; 5 by default"
        )

    registry = group("registry", "look at the registered versions")
    add = verb("log", _registry_log, "print who was in production, when and why", registry)
    add.add_argument("--json", action="store_true", help="as a list in JSON")

    add = verb("score", _score, "print what completions earn, one JSON object a line")
    add.add_argument("file", metavar="FILE", type=Path, help="JSON lines with completion, label, boxes (504x504 frame)")
    add.add_argument("--profile", choices=("calibrated", "paper"), help="reward profile; train.profile by default")

    for each in leaves:
        add_settings(each)
    if argv and not argv[0].startswith("-") and argv[0] not in verbs.choices:
        nearest = difflib.get_close_matches(argv[0], verbs.choices, n=1, cutoff=0)
        parser.error(f"there is no verb {argv[0]!r}; the nearest is {nearest[0]} (`adfm --help` lists all)")
    return parser.parse_args(argv)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--params` and `--set`, by which every verb and pipeline takes its settings."""
    parser.add_argument(
        "--params",
        metavar="FILE",
        type=Path,
        action="append",
        help="settings; repeatable, later files win key by key; params.yaml, if there is one, by default",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a setting, as in train.steps=50; repeatable",
    )


def _named(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL")
    return name, model


def _part(text: str) -> tuple[int, int]:
    part, _, of = text.partition("/")
    if not (part.isdecimal() and of.isdecimal() and 1 <= int(part) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, as in 2/8")
    return int(part), int(of)


def _params(args: argparse.Namespace, params: Params) -> None:
    from adfm.files import replace_text
    from adfm.params import merged

    text = merged(args.params, args.set)
    if args.out is None:
        print(text, end="")
    else:
        replace_text(text, args.out)


def _check(args: argparse.Namespace, params: Params) -> None:
    from adfm.preflight import check

    check(params, args.out)


def _fetch(args: argparse.Namespace, params: Params) -> None:
    from adfm.data.sources import fetch

    files, size = fetch(args.uri, args.out)
    print(f"{args.out}: {files:,} files, {size / 1e6:,.1f} MB")
    print(f"next: adfm convert {shlex.quote(str(args.out))} data/shards")


def _convert(args: argparse.Namespace, params: Params) -> None:
    from adfm.data.conversion import convert, inspect_part

    if args.part:
        inspect_part(args.raw, args.out, params, *args.part)
    else:
        convert(args.raw, args.out, params, args.parts)


def _validate(args: argparse.Namespace, params: Params) -> None:
    from adfm.validation.validate import require

    require(args.shards, args.out, params)


def _show(args: argparse.Namespace, params: Params) -> None:
    from adfm.data.show import show

    show(args.folder, args.out, params, args.split, args.images)


def _sft(args: argparse.Namespace, params: Params) -> None:
    from adfm.training.launch import reported
    from adfm.training.sft import sft

    with reported():
        sft(args.shards, args.out, params, args.force)


def _detector(args: argparse.Namespace, params: Params) -> None:
    from adfm.training.detector import train

    train(args.shards, args.out, params, args.force)


def _train(args: argparse.Namespace, params: Params) -> None:
    from adfm.training.grpo import train
    from adfm.training.launch import reported

    with reported():
        train(args.shards, args.model, args.out, params, force=args.force)


def _resend(args: argparse.Namespace, params: Params) -> None:
    from adfm.training.outbox import resend

    resend(args.folder)


def _evaluate(args: argparse.Namespace, params: Params) -> None:
    from adfm.evaluation.evaluate import evaluate, models_to_compare, read_production

    others = dict(args.compare)
    if args.production:
        others |= models_to_compare(read_production(args.production), args.model)
    evaluate({**others, "trained": args.model}, args.shards, args.out, params, args.folds)


def _folds(args: argparse.Namespace, params: Params) -> None:
    from adfm.training.folds import cross_validate

    cross_validate(args.shards, args.out, params)


def _production(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.production import write

    write(args.out, params.mlflow.registered_model, args.policy)


def _predict(args: argparse.Namespace, params: Params) -> None:
    from adfm.serving.predict import predict

    model = args.model or f"models:/{params.mlflow.registered_model}@production"
    predict(args.images, model, params, args.out or (None if args.json else Path("predictions")), args.json)


def _serve(args: argparse.Namespace, params: Params) -> None:
    from adfm.serving.server import serve

    model = args.model or f"models:/{params.mlflow.registered_model}@production"
    serve(model, args.host, args.port, args.workers, args.shadow)


def _served(args: argparse.Namespace, params: Params) -> None:
    from adfm.serving import servelog

    print(servelog.summary(servelog.read(args.logs)))


def _report(args: argparse.Namespace, params: Params) -> None:
    from adfm.evaluation.report import write

    write(args.evaluation, args.shards, args.out)


def _register(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.registration import register

    register(args.model, args.shards, args.evaluation, args.out, params, wait=args.wait)


def _gate(args: argparse.Namespace, params: Params) -> int:
    from adfm.registry import gate, page, plan, policy, tables

    judged_by = policy.load(args.policy)
    if args.plan:
        print(plan.of_shards(args.plan, judged_by, args.look))
        return 0
    if args.candidate is None:
        raise tables.Incomparable("name the predictions to judge, or --plan SHARDS (`adfm gate --help`).")
    production, anchor = (None if file is None else tables.read(file) for file in (args.production, args.anchor))
    decision = gate.decide(tables.read(args.candidate), production, anchor, judged_by, args.look)
    decided = dataclasses.asdict(decision)
    print(json.dumps(decided, indent=2, allow_nan=False) if args.json else page.screen(decided))
    return {"passed": 0, "failed": 3}.get(decision.verdict, 4)


def _promote(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.promotion import promote, promote_approved

    if args.version is not None:
        promote(args.version, params.mlflow.registered_model, args.by)
    elif not promote_approved(params.mlflow.registered_model, args.by):
        print(f"no version of {params.mlflow.registered_model} is newly approved; nothing to do")


def _rollback(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.promotion import rollback

    rollback(params.mlflow.registered_model, args.by, args.to, args.why)


def _approve(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.promotion import approve

    approve(args.version, params.mlflow.registered_model, "approved", args.reason)


def _reject(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.promotion import approve

    approve(args.version, params.mlflow.registered_model, "rejected", args.reason)


def _audit(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.audit import audit

    print(audit(params.mlflow.registered_model))


def _policy_set(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.registration import set_policy

    set_policy(args.file, params)


def _policy_show(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.promotion import history

    text = history(params.mlflow.registered_model).policy
    print(text or f"no policy is registered for {params.mlflow.registered_model}", end="" if text else "\n")


def _keys_rotate(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.promotion import confirm_keys

    confirm_keys(params.mlflow.registered_model, args.by)


def _serve_approvals(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.approvals import serve

    serve(params, args.poll)


def _approvals_health(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.approvals import health

    health(args.poll)


def _registry_log(args: argparse.Namespace, params: Params) -> None:
    from adfm.registry.history import table
    from adfm.registry.promotion import history

    read = history(params.mlflow.registered_model)
    if args.json:
        print(json.dumps([dataclasses.asdict(step) for step in read.steps], indent=2))
    else:
        print(table(read))


def _score(args: argparse.Namespace, params: Params) -> None:
    from adfm.method.score import score_file

    score_file(args.file, args.profile or params.train.profile, sys.stdout)
