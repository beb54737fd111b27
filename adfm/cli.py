"""The command line, `adfm <verb>`: each verb calls one function of the package."""

import argparse
import dataclasses
import difflib
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adfm import __version__, extras, outcome
from adfm.errors import AdfmError
from adfm.process.environment import set_environment
from adfm.process.stopping import Stopped, Terminated, handle_sigterm
from adfm.text import did_you_mean, printable_output
from adfm.verbs import GROUPS, VERBS, epilog

# Names before 0.1.0, until 0.3: another verb of adfm, or an experiment of `python -m experiments`.
_RENAMED = {"warmup": "sft"}
_MOVED = {"ablate": "ablation", "tiny-base": "tiny-base"}

# First words of the verbs of two words.
_PREFIXES = {
    "policy": "the registered policy of the gate",
    "keys": "the keys that sign versions and the history",
    "approvals": "the service that accepts submissions and promotes what is approved",
    "registry": "the registered versions",
}

_HELP = """\
usage: adfm <verb> ...

Adapt a vision-language model to finding defects: data, training, evaluation, registration.
`adfm <verb> --help` describes a verb, with examples and exit codes.

{verbs}

from a data set to production (`make repro` does all up to `register`, and runs only what changed):
  adfm check
  adfm fetch synthetic:// data/raw/synthetic
  adfm convert data/raw/synthetic data/shards
  adfm validate data/shards
  adfm sft data/shards models/sft
  adfm detector data/shards models/detector
  adfm train data/shards models/sft models/trained
  adfm evaluate models/trained data/shards evaluation --compare detector=models/detector --compare sft=models/sft
  adfm register models/trained data/shards evaluation registration
  adfm approve 1
  adfm promote 1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0; 1 for an error, explained on stderr; 2 for wrong usage, by argparse; 75 for a training that
        was stopped after a checkpoint and can be resumed; 130 interrupted; 141 nobody reads the output; 143 terminated.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _RENAMED:
        print(f"adfm: `adfm {argv[0]}` is now `adfm {_RENAMED[argv[0]]}`; the old name goes with 0.3", file=sys.stderr)
        argv = [_RENAMED[argv[0]], *argv[1:]]
    if argv and argv[0] in _MOVED:
        experiment = ["-m", "experiments", _MOVED[argv[0]]]
        print(f"adfm: `adfm {argv[0]}` is now `python {' '.join(experiment)}`, in a checkout of adfm", file=sys.stderr)
        return subprocess.call([sys.executable, *experiment, *argv[1:]])
    with printable_output():  # names in messages are whatever files and annotations hold
        return run(_parse(argv), ["adfm", *argv])


def run(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Call `args.run` and turn errors into an exit status.

    Args:
        args: What a parser has read: `run`, which takes these arguments, and `name`. If the parser has `add_settings`,
            the settings are loaded into `settings`, and the registered model's name into `registered_model`.
        command: The whole command as it was typed.

    Returns:
        The exit status, as of `main`.
    """
    begin = time.monotonic()
    try:
        if "params" in args:
            set_environment()  # before the imports of libraries that read these variables
            from adfm.params import load

            args.settings = load(args.params, args.set)
            args.registered_model = args.settings.mlflow.registered_model
        with handle_sigterm():
            status = args.run(args) or 0
            if not status and (block := outcome.finished(args, time.monotonic() - begin)):
                print(block)
        sys.stdout.flush()  # a full disk or a closed pipe shows itself here, not in the flush at exit
        return int(status)
    except Stopped as stopped:
        print(f"adfm: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except AdfmError as error:
        return _fail(error, error.exit_code)
    except ModuleNotFoundError as error:
        message = extras.missing(error)
        if message is None:  # a bug, which needs its traceback
            raise
        return _fail(message, 1)
    except KeyboardInterrupt as interrupt:
        word, status = ("terminated", 143) if isinstance(interrupt, Terminated) else ("interrupted", 130)
        print(f"\nadfm: {word}; {outcome.interrupted(args, command)}", file=sys.stderr)
        return status
    except BrokenPipeError:
        _drop_output()
        return 141  # 128 + SIGPIPE, as shells report it
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        return _fail(f"{error.filename or 'output'}: no space is left on the disk; free some and start again.", 1)


def _drop_output() -> None:
    # What stdout still buffers cannot be written; the flush at exit would fail again, with a traceback.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: object, status: int) -> int:
    print(f"adfm: error: {message}", file=sys.stderr)
    return status


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, _ = _parser()
    first, *_ = argv = argv or ["--help"]
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        parser.error(f"the verb comes first: adfm <verb> {first} ...")
    names = {name.partition(" ")[0] for name in VERBS}
    if not first.startswith("-") and first not in names:
        near = did_you_mean(difflib.get_close_matches(first, names, n=1)) or "`adfm --help` lists all verbs"
        parser.error(f"unknown verb `{first}`; {near}")
    # parse_args would report unknown options without the verb's usage and without a suggestion.
    args, extra = parser.parse_known_args(argv)
    if extra:
        option = extra[0].partition("=")[0]
        if not option.startswith("-"):
            args.parser.error(f"unexpected argument `{option}`")
        near = did_you_mean(difflib.get_close_matches(option, args.parser._option_string_actions, n=1))
        args.parser.error(f"unknown option `{option}`; {near or f'`{args.parser.prog} --help` lists all options'}")
    return args


def _parser() -> tuple[argparse.ArgumentParser, list[argparse.ArgumentParser]]:
    """The parser of the command line, and those of its verbs."""
    parser = argparse.ArgumentParser("adfm", add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse lists all verbs in one group, so the help is a text of its own.
    parser.add_argument("-h", "--help", action="version", version=_help(), help="show this help message and exit")
    parser.add_argument("--version", action="version", version=f"adfm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="<verb>", required=True)
    groups: dict[str, Any] = {}
    leaves: list[argparse.ArgumentParser] = []

    def verb(name: str, run: Callable[..., int | None], /, **paths: str) -> argparse.ArgumentParser:
        """Add a verb whose first arguments are `paths`, each with its help."""
        first, _, second = name.partition(" ")
        if second and first not in groups:
            prefix = verbs.add_parser(first, help=_PREFIXES[first], description=_PREFIXES[first])
            groups[first] = prefix.add_subparsers(metavar="<verb>", required=True, title="verbs")
        leaf: argparse.ArgumentParser = (groups[first] if second else verbs).add_parser(
            second or first,
            help=VERBS[name].summary,
            description=textwrap.fill(VERBS[name].about, min(shutil.get_terminal_size().columns - 2, 100)),
            epilog=epilog(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        leaf.set_defaults(run=run, name=name, parser=leaf)
        leaves.append(leaf)
        for each, about in paths.items():
            path(leaf, each, about)
        return leaf

    def path(leaf: argparse.ArgumentParser, name: str, about: str, **options: Any) -> None:
        options = {"metavar": name.removeprefix("--").upper()} | options
        leaf.add_argument(name, type=Path, help=about, **options)

    path(verb("check", _check), "out", "file to write if everything is in order", nargs="?")

    add = verb("fetch", _fetch)
    source = "folder, .zip or .tar archive, s3://bucket/prefix, dvc://REPO@REV:PATH, synthetic://"
    add.add_argument("uri", metavar="URI", help=source)
    path(add, "out", "folder to write", metavar="DIR")

    add = verb("convert", _convert, raw="folder of the raw data set", out="folder to write the shards to")
    layout = "layout of RAW, by default detected; the same as --set convert.layout=L"
    settings: dict[str, Any] = {"dest": "set", "type": "convert.layout={}".format, "action": "append", "default": []}
    add.add_argument("--layout", metavar="L", help=layout, **settings)
    several = add.add_mutually_exclusive_group()
    several.add_argument("--part", metavar="I/N", type=_part, help="inspect the I-th of N parts alone, for --parts")
    several.add_argument("--parts", metavar="PART", type=Path, nargs="+", default=[], help="folders of all N parts")

    shards = "folder of shards"
    add = verb("validate", _validate, shards=shards)
    path(add, "out", "report folder; reports/validation by default", nargs="?", default=Path("reports/validation"))

    add = verb("show", _show)
    path(add, "folder", "folder of a raw data set or of shards", metavar="DIR")
    path(add, "--out", "page.html or sheet.png; show-<DIR>.html by default", metavar="FILE")
    add.add_argument("--split", choices=("train", "validation", "test"), help="this split alone")
    add.add_argument("-n", dest="images", metavar="N", type=int, default=48, help="how many images; 48 by default")

    sft = verb("sft", _sft, shards=shards, out="folder to write the adapter to")
    detector = verb("detector", _detector, shards=shards, out="folder to write the detector to")
    train = verb("train", _train, shards=shards, model="folder that sft or train wrote", out="folder of the adapter")
    for add in (sft, detector, train):
        add.add_argument("--force", action="store_true", help="replace a finished model at OUT")
    path(verb("resend", _resend), "folder", "folder that sft or train left: <OUT>.unsent", metavar="UNSENT")

    add = verb("evaluate", _evaluate)
    candidate = (
        "the candidate: a folder that sft or train wrote, a registered version (models:/adfm@production, "
        "models:/adfm/3), or a base model's name"
    )
    add.add_argument("model", metavar="MODEL", help=candidate)
    path(add, "shards", shards)
    path(add, "out", "folder to write")
    further = "a further model; repeatable"
    add.add_argument("--compare", metavar="NAME=MODEL", type=_pair, action="append", default=[], help=further)
    path(add, "--production", "compare with the versions in FILE, which `adfm production` wrote", metavar="FILE")
    path(add, "--folds", "show the cross-validation in DIR, which `adfm folds` wrote", metavar="DIR")

    verb("folds", _folds, shards=shards, out="folder to write")

    add = verb("production", _production)
    path(add, "out", "JSON file to write", metavar="FILE")
    path(add, "--policy", "a second one: digest of the policy that judges", metavar="FILE")

    add = verb("predict", _predict)
    path(add, "images", "an image, or a folder of them", metavar="IMAGE", nargs="+")
    add.add_argument("--model", metavar="MODEL", help="as of evaluate; the registered version in production by default")
    path(add, "--out", "folder for the pictures; `predictions` by default, none with --json", metavar="DIR")
    add.add_argument("--json", action="store_true", help="print a line of JSON for each image")

    add = verb("serve", _serve)
    versions = "models:/adfm/3 or models:/adfm@alias; the version in production by default"
    add.add_argument("model", metavar="MODEL", nargs="?", help=versions)
    add.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="to listen on; 127.0.0.1 by default")
    add.add_argument("--port", metavar="PORT", type=int, default=5000, help="to listen on; 5000 by default")
    add.add_argument("--workers", metavar="N", type=int, default=1, help="processes, each with a model; 1 by default")
    shadow = "another version, which answers the same images for the log alone (ADFM_SERVE_LOG, `adfm served`)"
    add.add_argument("--shadow", metavar="MODEL", help=shadow)

    path(verb("served", _served), "logs", "file that ADFM_SERVE_LOG named", metavar="LOG", nargs="+")

    evaluated = {"evaluation": "folder that evaluate wrote", "shards": "folder of the shards that were evaluated"}
    verb("report", _report, **evaluated, out="folder to write: report.html and images/")

    add = verb("register", _register, model="folder that train wrote", shards=shards)
    path(add, "evaluation", "folder that evaluate wrote")
    path(add, "out", "folder to write")
    wait = "how long to wait for the approvals service where your key is not one of its own; 900 by default"
    add.add_argument("--wait", metavar="SECONDS", type=float, default=900, help=wait)

    add = verb("gate", _gate)
    path(add, "candidate", "predictions.parquet that evaluate wrote", nargs="?")
    path(add, "production", "predictions for the same images by the version in production", nargs="?")
    path(add, "--anchor", "predictions for the same images by the anchor")
    path(add, "--policy", "the policy; gate.yaml in this folder by default", metavar="FILE")
    look = "candidates that these test images have judged, this one included; 1 by default"
    add.add_argument("--look", metavar="N", type=int, default=1, help=look)
    add.add_argument("--json", action="store_true", help="print the whole decision as JSON")
    plan = "print how many images of which kind the policy needs, and how many of them these shards have"
    path(add, "--plan", plan, metavar="SHARDS")

    promote = verb("promote", _promote)
    version = "number of the version; the newest approved one, if any, by default"
    promote.add_argument("version", metavar="VERSION", nargs="?", help=version)
    rollback = verb("rollback", _rollback)
    rollback.add_argument("--to", metavar="VERSION", help="an earlier version; the one before by default")
    rollback.add_argument("--why", metavar="TEXT", default="", help="the reason, for the history")
    for add in (promote, rollback, verb("keys rotate", _rotate_keys)):
        add.add_argument("--by", metavar="NAME", help="who does it; the user of this process by default")

    for name in ("approve", "reject"):
        add = verb(name, _approve)
        add.add_argument("version", metavar="VERSION", help="number of the version")
        add.add_argument("--reason", metavar="TEXT", default="", help="why, for the history")

    verb("audit", _audit)
    path(verb("policy set", _set_policy), "file", "gate.yaml by default", nargs="?", default=Path("gate.yaml"))
    verb("policy show", _show_policy)

    for add in (verb("approvals serve", _serve_approvals), verb("approvals health", _check_approvals)):
        pause = "pause between two polls of MLflow; 5 by default"
        add.add_argument("--poll", metavar="SECONDS", type=float, default=5, help=pause)

    verb("registry log", _log).add_argument("--json", action="store_true", help="as a list in JSON")

    add = verb("score", _score, file="JSON lines with completion, label, boxes (504x504 frame)")
    add.add_argument("--profile", choices=("calibrated", "paper"), help="reward profile; train.profile by default")

    path(verb("params", _params), "out", "file to write to instead of stdout, e.g. params.yaml", nargs="?")

    for leaf in leaves:
        add_settings(leaf)  # but not to the two that follow

    verb("env", _env).add_argument("--json", action="store_true", help="as JSON")
    shells = ("bash", "zsh", "tcsh", "fish")
    verb("completion", _completion).add_argument("shell", choices=shells, help="the shell to write the script for")
    return parser, leaves


def _help() -> str:
    """The help of `adfm` itself: its verbs, group by group."""
    groups = {"options": {"-h, --help": "show this help message and exit", "--version": "print the version and exit"}}
    groups |= {title: {name: verb.summary for name, verb in verbs.items()} for title, verbs in GROUPS.items()}
    lists = [
        "\n".join([f"{title}:", *(f"  {name:<18}{about}" for name, about in group.items())])
        for title, group in groups.items()
    ]
    return _HELP.format(verbs="\n\n".join(lists))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `--params` and `--set`, by which every verb and pipeline takes its settings."""
    files = "settings; repeatable, later files win key by key; params.yaml, if there is one, by default"
    parser.add_argument("--params", metavar="FILE", type=Path, action="append", help=files)
    setting = "a setting, as in train.steps=50; repeatable"
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=setting)


def _pair(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL")
    return name, model


def _part(text: str) -> tuple[int, int]:
    part, _, of = text.partition("/")
    if not (part.isdecimal() and of.isdecimal() and 1 <= int(part) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, as in 2/8")
    return int(part), int(of)


# Each verb imports what it calls: most need a part of the libraries only, and torch alone takes seconds to import.


def _params(args: argparse.Namespace) -> None:
    from adfm.files import replace_text
    from adfm.params import merged

    text = merged(args.params, args.set)
    if args.out is None:
        print(text, end="")
    else:
        replace_text(text, args.out)


def _check(args: argparse.Namespace) -> None:
    from adfm.preflight import check

    check(args.settings, args.out)


def _fetch(args: argparse.Namespace) -> None:
    from adfm.data.sources import fetch

    args.files, args.bytes = fetch(args.uri, args.out)


def _convert(args: argparse.Namespace) -> None:
    from adfm.data.conversion import convert, inspect_part

    if args.part:
        inspect_part(args.raw, args.out, args.settings, *args.part)
    else:
        convert(args.raw, args.out, args.settings, args.parts)


def _validate(args: argparse.Namespace) -> None:
    from adfm.validation.validate import require

    require(args.shards, args.out, args.settings)


def _show(args: argparse.Namespace) -> None:
    from adfm.data.show import show

    show(args.folder, args.out, args.settings, args.split, args.images)


def _sft(args: argparse.Namespace) -> None:
    from adfm.training.launch import reported
    from adfm.training.sft import sft

    with reported():
        sft(args.shards, args.out, args.settings, args.force)


def _detector(args: argparse.Namespace) -> None:
    from adfm.training.detector import train

    train(args.shards, args.out, args.settings, args.force)


def _train(args: argparse.Namespace) -> None:
    from adfm.training.grpo import train
    from adfm.training.launch import reported

    with reported():
        train(args.shards, args.model, args.out, args.settings, force=args.force)


def _resend(args: argparse.Namespace) -> None:
    from adfm.training.outbox import resend

    resend(args.folder)


def _evaluate(args: argparse.Namespace) -> None:
    from adfm.evaluation.evaluate import evaluate, models_to_compare, read_production

    others = dict(args.compare)
    if args.production:
        others |= models_to_compare(read_production(args.production), args.model)
    evaluate({**others, "trained": args.model}, args.shards, args.out, args.settings, args.folds)


def _folds(args: argparse.Namespace) -> None:
    from adfm.training.folds import cross_validate

    cross_validate(args.shards, args.out, args.settings)


def _production(args: argparse.Namespace) -> None:
    from adfm.registry.production import write

    write(args.out, args.registered_model, args.policy)


def _predict(args: argparse.Namespace) -> None:
    from adfm.serving.predict import predict

    model = args.model or f"models:/{args.registered_model}@production"
    predict(args.images, model, args.settings, args.out or (None if args.json else Path("predictions")), args.json)


def _serve(args: argparse.Namespace) -> None:
    from adfm.serving.server import serve

    model = args.model or f"models:/{args.registered_model}@production"
    serve(model, args.host, args.port, args.workers, args.shadow)


def _served(args: argparse.Namespace) -> None:
    from adfm.serving import servelog

    print(servelog.summary(servelog.read(args.logs)))


def _report(args: argparse.Namespace) -> None:
    from adfm.evaluation.report import write

    write(args.evaluation, args.shards, args.out)


def _register(args: argparse.Namespace) -> None:
    from adfm.registry.registration import register

    register(args.model, args.shards, args.evaluation, args.out, args.settings, wait=args.wait)


def _gate(args: argparse.Namespace) -> int:
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
    return {"passed": 0, "failed": 3}.get(decision.verdict, 4)  # 1 and 2 are errors


def _promote(args: argparse.Namespace) -> None:
    from adfm.registry.promotion import promote, promote_approved

    if args.version is not None:
        promote(args.version, args.registered_model, args.by)
    elif not promote_approved(args.registered_model, args.by):
        print(f"no version of {args.registered_model} is newly approved; nothing to do")


def _rollback(args: argparse.Namespace) -> None:
    from adfm.registry.promotion import rollback

    rollback(args.registered_model, args.by, args.to, args.why)


def _approve(args: argparse.Namespace) -> None:
    from adfm.registry.promotion import approve

    decision = {"approve": "approved", "reject": "rejected"}[args.name]
    approve(args.version, args.registered_model, decision, args.reason)


def _audit(args: argparse.Namespace) -> None:
    from adfm.registry.audit import audit

    print(audit(args.registered_model))


def _set_policy(args: argparse.Namespace) -> None:
    from adfm.registry.registration import set_policy

    set_policy(args.file, args.registered_model)


def _show_policy(args: argparse.Namespace) -> None:
    from adfm.registry.promotion import history

    text = history(args.registered_model).policy
    print(text or f"no policy is registered for {args.registered_model}", end="" if text else "\n")


def _rotate_keys(args: argparse.Namespace) -> None:
    from adfm.registry.promotion import confirm_keys

    confirm_keys(args.registered_model, args.by)


def _serve_approvals(args: argparse.Namespace) -> None:
    from adfm.registry.approvals import serve

    serve(args.settings.mlflow, args.poll)


def _check_approvals(args: argparse.Namespace) -> None:
    from adfm.registry.approvals import health

    health(args.poll)


def _log(args: argparse.Namespace) -> None:
    from adfm.registry.history import table
    from adfm.registry.promotion import history

    events = history(args.registered_model)
    if args.json:
        print(json.dumps([dataclasses.asdict(step) for step in events.steps], indent=2))
    else:
        print(table(events))


def _score(args: argparse.Namespace) -> None:
    from adfm.method.score import score_file

    score_file(args.file, args.profile or args.settings.train.profile, sys.stdout)


def _env(args: argparse.Namespace) -> None:
    from adfm import env_report

    report = env_report.collect()
    print(json.dumps(report, indent=2) if args.json else env_report.text(report))


def _completion(args: argparse.Namespace) -> None:
    import shtab

    parser, leaves = _parser()
    for action in (action for leaf in leaves for action in leaf._actions):
        if action.type is Path or action.dest in ("uri", "model"):  # these two may be a file, and may be something else
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
