"""What the command line says when a stage has ended: what it wrote and the next command; interrupted, what is kept."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm.process import pod

if TYPE_CHECKING:
    from argparse import Namespace

    from adfm.params import Params

Command = list[str | Path]

# Where the path writes, as README.md and DVC have it; the user may choose other folders.
_SHARDS, _SFT, _EVALUATION, _REGISTRATION = "data/shards", "models/sft", "evaluation", "registration"


def finished(args: Namespace, params: Params | None, seconds: float) -> str:
    """The block at the end of a stage: what it wrote, how much, how long it took, and the next command of the path.

    Under DVC, which starts the next stage itself, there is no next command until the last one, and in pods nothing at
    all: their logs are read by machines.

    Args:
        args: The arguments of the verb.
        params: Its settings.
        seconds: How long it took.
    """
    if _started_by_a_program() or params is None:
        return ""
    lines = []
    if args.name in _WROTE and (counted := _WROTE[args.name](args)):
        lines.append(f"wrote {args.out}: {counted}, {_size(args.out)}, in {_duration(seconds)}")
    by_hand = "DVC_STAGE" not in os.environ or args.name == "register"
    if by_hand and args.name in _NEXT and (command := _NEXT[args.name](args, params)):
        settings = [["--params", file] for file in args.params or ()] + [["--set", each] for each in args.set]
        lines.append(f"next: {_typed(['adfm', *command, *(word for option in settings for word in option)])}")
    return "\n".join(lines)


def interrupted(args: Namespace, command: Sequence[str]) -> str:
    """What is kept of a stage that was interrupted, and the command that continues it.

    Args:
        args: The arguments of the verb.
        command: The whole command as it was typed.
    """
    if _started_by_a_program():
        return "what was finished is kept"
    again = "dvc repro" if "DVC_STAGE" in os.environ else _typed(command)
    if args.name in ("register", "promote", "rollback"):
        return f"the same command completes what was begun:\n  {again}"
    if args.name == "ablation":
        return f"finished runs and checkpoints are kept in {args.runs}; to continue, run the same command:\n  {again}"
    if not isinstance(getattr(args, "out", None), Path) or args.name not in _PARTIAL:
        return "nothing is left half written"
    folder = args.out.with_name(args.out.name + _PARTIAL[args.name])
    if args.name == "train":
        from adfm.training import checkpoints

        steps = checkpoints.every(folder)
        kept = f"checkpoints up to step {steps[-1]} are kept in {folder}" if steps else ""
    else:
        kept = f"what was finished is kept in {folder}" if _PARTIAL[args.name] and folder.is_dir() else ""
    if kept:
        return f"{kept}; to continue, run the same command:\n  {again}"
    return f"nothing of it is kept; to start over, run the same command:\n  {again}"


# Where a stage keeps what is finished of it, beside its output; "": it starts over.
_PARTIAL = {
    "fetch": ".partial",
    "convert": ".partial",
    "validate": "",
    "sft": "",
    "detector": "",
    "train": ".checkpoint",
    "evaluate": ".answers.partial",
    "folds": ".partial",
    "tiny-base": ".checkpoint",
}


def _started_by_a_program() -> bool:
    """Whether this process is a pod's, one that a stage of a pipeline has started, or not the first of several."""
    several = os.environ.get("RANK", "0") != "0"
    return several or pod.inside() or "ADFM_REPORTS" in os.environ


# ---------------------------------------------------------------------------------------------------- what was written


def _images(shards: Path, split: str = "*") -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in shards.glob(f"{split}-*.parquet"))


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _converted(args: Namespace) -> str:
    return "" if args.part else f"{_images(args.out):,} images"


def _trained(args: Namespace) -> str:
    return f"trained with {_images(args.shards, 'train'):,} images"


_WROTE: dict[str, Callable[[Namespace], str]] = {
    "fetch": lambda args: f"{sum(file.is_file() for file in args.out.rglob('*')) - 1:,} files",  # and the manifest
    "convert": _converted,
    "validate": lambda args: f"{_images(args.shards):,} images checked",
    "sft": _trained,
    "detector": _trained,
    "train": _trained,
    "evaluate": lambda args: f"{_json(args.out / 'evaluation.json')['images']:,} images",
    "register": lambda args: "version {model}/{version}".format(**_json(args.out / "registration.json")),
}
"""What the block says of a stage's output, by verb."""


def _size(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _typed(command: Sequence[str | Path]) -> str:
    return shlex.join(map(str, command))


# -------------------------------------------------------------------------------------------------------- what is next


def _after_convert(args: Namespace, params: Params) -> Command | None:
    if not args.part:
        return ["validate", args.out]
    parts = sorted(file.parent for file in args.out.parent.glob("*/inspection.json"))
    return ["convert", args.raw, _SHARDS, "--parts", *parts] if len(parts) == args.part[1] else None


def _after_model(args: Namespace, params: Params) -> Command:
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


def _after_evaluate(args: Namespace, params: Params) -> Command | None:
    about = Path(args.model, "adfm.json")
    trained = about.is_file() and _json(about).get("stage") == "train"
    return ["register", args.model, args.shards, args.out, _REGISTRATION] if trained else None


def _after_register(args: Namespace, params: Params) -> Command | None:
    about = _json(args.out / "registration.json")
    return ["approve", about["version"]] if about["gate"] == "passed" else None


_NEXT: dict[str, Callable[[Namespace, Params], Command | None]] = {
    "check": lambda args, params: ["fetch", params.fetch.source, Path("data/raw") / params.fetch.name],
    "fetch": lambda args, params: ["convert", args.out, _SHARDS],
    "convert": _after_convert,
    "validate": lambda args, params: ["sft", args.shards, _SFT],
    "sft": _after_model,
    "detector": _after_model,
    "train": _after_model,
    "evaluate": _after_evaluate,
    "register": _after_register,
    "approve": lambda args, params: ["promote", args.version],
}
"""The next command of the path, by verb."""
