"""Experiments on adfm, from a checkout: `python -m experiments ablation …`, `python -m experiments tiny-base OUT`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adfm.cli import add_settings, run
from adfm.text import printable_output


def _ablation(args: argparse.Namespace) -> None:
    from experiments.ablation import ARMS, ablate

    ablate(args.shards, args.runs, args.out, args.settings, args.arms or list(ARMS), args.seeds, args.jobs)


def _tiny_base(args: argparse.Namespace) -> None:
    from experiments.tiny_base import build

    build(args.out, args.settings.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m experiments", description="Experiments on adfm.")
    verbs = parser.add_subparsers(metavar="<experiment>", required=True)

    add = verbs.add_parser("ablation", help="train and evaluate the arms of the ablation (docs/ablation.md); resumes")
    add.add_argument("shards", metavar="SHARDS", type=Path, help="folder of shards")
    add.add_argument("runs", metavar="RUNS", type=Path, help="folder of the runs; finished ones are kept")
    add.add_argument("out", metavar="OUT", type=Path, help="folder for ablation.json, ablation.md and ablation.png")
    add.add_argument(
        "--arms", metavar="ARM", nargs="+", help="answer, stages, paper, calibrated, resample, doubt; all by default"
    )
    add.add_argument("--seeds", metavar="N", type=int, default=3, help="runs an arm; 3 by default")
    add.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time; 1 by default")
    add.set_defaults(run=_ablation, name="ablation")
    add_settings(add)

    add = verbs.add_parser("tiny-base", help="train the embedded base model (docs/training.md); resumes")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to write the model to")
    add.set_defaults(run=_tiny_base, name="tiny-base")
    add_settings(add)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one experiment; returns the exit status, as of `adfm.cli.main`."""
    with printable_output():
        return run(_parser().parse_args(argv), ["python", "-m", "experiments", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
