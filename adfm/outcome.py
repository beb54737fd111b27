"""The last lines of a command: what it wrote and the next command; after an interrupt, what is kept of it."""

import json
import os
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adfm.process import pod

Command = list[str | Path]

# Folders as in README.md and dvc.yaml; the user may choose others.
_SHARDS, _SFT, _EVALUATION, _REGISTRATION = "data/shards", "models/sft", "evaluation", "registration"


def finished(args: Namespace, seconds: float) -> str:
    """Return what a stage wrote, its size and duration, and the next command; "" for other verbs and in pods.

    Args:
        args: The arguments of the verb, with its settings, after it has run.
        seconds: How long it took.
    """
    if _started_by_a_program() or "settings" not in args:
        return ""
    lines = []
    if args.name in _WROTE and (counted := _WROTE[args.name](args)):
        lines.append(f"wrote {args.out}: {counted}, {_size(args) / 1e6:,.1f} MB, in {_duration(seconds)}")
    # DVC starts the next stage itself, up to the last.
    by_hand = "DVC_STAGE" not in os.environ or args.name == "register"
    if by_hand and args.name in _NEXT and (command := _NEXT[args.name](args)):
        for option, values in (("--params", args.params or ()), ("--set", args.set)):
            command += [word for value in values for word in (option, value)]
        lines.append(f"next: {_quoted(['adfm', *command])}")
    return "\n".join(lines)


def interrupted(args: Namespace, command: Sequence[str]) -> str:
    """Return what is kept of a stage that was interrupted, and the command that continues it.

    Args:
        args: The arguments of the verb.
        command: The whole command as it was typed.
    """
    if _started_by_a_program():
        return "what was finished is kept"
    again = "dvc repro" if "DVC_STAGE" in os.environ else _quoted(command)
    if args.name in ("register", "promote", "rollback"):
        return f"the same command completes what was begun:\n  {again}"
    if args.name == "ablation":
        return f"finished runs and checkpoints are kept in {args.runs}; to continue, run the same command:\n  {again}"
    if args.name not in _PARTIAL:
        return "nothing is left half written"
    folder = args.out.with_name(args.out.name + _PARTIAL[args.name])
    kept = "nothing of it is kept; to start over"
    if args.name == "train":
        from adfm.training import checkpoints

        if steps := checkpoints.every(folder):
            kept = f"checkpoints up to step {steps[-1]} are kept in {folder}; to continue"
    elif _PARTIAL[args.name] and folder.is_dir():
        kept = f"what was finished is kept in {folder}; to continue"
    return f"{kept}, run the same command:\n  {again}"


# Ending of the folder, beside its output, in which a stage keeps what is finished of it; "": it starts over.
_PARTIAL = {
    **dict.fromkeys(("fetch", "convert", "folds"), ".partial"),
    **dict.fromkeys(("validate", "sft", "detector"), ""),
    **dict.fromkeys(("train", "tiny-base"), ".checkpoint"),
    "evaluate": ".answers.partial",
}


def _started_by_a_program() -> bool:
    """Whether this process runs in a pod or for a pipeline's task, or is not the first of a distributed training."""
    return os.environ.get("RANK", "0") != "0" or pod.inside() or "ADFM_REPORTS" in os.environ


def _images(shards: Path, split: str = "*") -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in shards.glob(f"{split}-*.parquet"))


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _trained(args: Namespace) -> str:
    return f"trained with {_images(args.shards, 'train'):,} images"


# What a stage's output is, in figures.
_WROTE: dict[str, Callable[[Namespace], str]] = {
    "fetch": lambda args: f"{args.files:,} files",
    "convert": lambda args: "" if args.part else f"{_images(args.out):,} images",
    "validate": lambda args: f"{_images(args.shards):,} images checked",
    **dict.fromkeys(("sft", "detector", "train"), _trained),
    "evaluate": lambda args: f"{_json(args.out / 'evaluation.json')['images']:,} images",
    "register": lambda args: "version {model}/{version}".format(**_json(args.out / "registration.json")),
}


def _size(args: Namespace) -> int:
    if args.name == "fetch":  # counted while it was written; a raw data set has many files
        return int(args.bytes)
    return sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _quoted(command: Sequence[str | Path]) -> str:
    return shlex.join(map(str, command))


def _after_convert(args: Namespace) -> Command | None:
    if not args.part:
        return ["validate", args.out]
    parts = sorted(file.parent for file in args.out.parent.glob("*/inspection.json"))
    return ["convert", args.raw, _SHARDS, "--parts", *parts] if len(parts) == args.part[1] else None


def _after_model(args: Namespace) -> Command:
    """The first of SFT, detector and training whose model is missing beside this one; with all, the evaluation."""
    beside = args.out.parent
    models = {"sft": beside / "sft", "detector": beside / "detector", "train": beside / "trained"}
    models |= {"sft": args.model} if args.name == "train" else {}
    models[args.name] = args.out
    for verb, folder in models.items():
        if not (folder / "adfm.json").is_file():
            start = [models["sft"]] if verb == "train" else []
            return [verb, args.shards, *start, folder]
    others = [word for name in ("detector", "sft") for word in ("--compare", f"{name}={models[name]}")]
    return ["evaluate", models["train"], args.shards, _EVALUATION, *others]


def _after_evaluate(args: Namespace) -> Command | None:
    about = Path(args.model, "adfm.json")
    trained = about.is_file() and _json(about).get("stage") == "train"
    return ["register", args.model, args.shards, args.out, _REGISTRATION] if trained else None


def _after_register(args: Namespace) -> Command | None:
    about = _json(args.out / "registration.json")
    return ["approve", about["version"]] if about["gate"] == "passed" else None


# The command after a verb, where it is known.
_NEXT: dict[str, Callable[[Namespace], Command | None]] = {
    "check": lambda args: ["fetch", args.settings.fetch.source, Path("data/raw") / args.settings.fetch.name],
    "fetch": lambda args: ["convert", args.out, _SHARDS],
    "convert": _after_convert,
    "validate": lambda args: ["sft", args.shards, _SFT],
    **dict.fromkeys(("sft", "detector", "train"), _after_model),
    "evaluate": _after_evaluate,
    "register": _after_register,
    "approve": lambda args: ["promote", args.version],
}
